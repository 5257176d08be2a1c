/* A bare guest for `-M virt,mte=on`: it turns the MMU on, as tags are only in Normal memory of the
   kind "tagged", sets tags, and rests. Memory from 0x40000000 on is mapped to itself. */
        .arch armv8.5-a+memtag
        .text
        .global _start
_start: ldr x0, =0xf0                     // attribute 0: Normal, tagged
        msr mair_el1, x0
        ldr x0, =(25 | (1 << 8) | (1 << 10) | (3 << 12) | (5 << 32) | (1 << 37))
        msr tcr_el1, x0                   // 39 bits of addresses, whose top byte is ignored
        adrp x1, table
        ldr x0, =(0x40000000 | (1 << 10) | (3 << 8) | 1)
        str x0, [x1, 8]                   // a block of 1 GiB
        msr ttbr0_el1, x1
        dsb sy
        tlbi vmalle1
        dsb sy
        isb
        mrs x0, sctlr_el1
        ldr x2, =((1 << 43) | (1 << 12) | (1 << 2) | 1)
        orr x0, x0, x2                    // allocation tags, caches, MMU
        msr sctlr_el1, x0
        isb
        ldr x3, =0x40200000               // for 64 KiB: granule n has the tag n % 16
        mov x4, 0
1:      and x5, x4, 15
        orr x6, x3, x5, lsl 56
        stg x6, [x6], 16
        and x3, x6, 0x00ffffffffffffff
        add x4, x4, 1
        cmp x4, 4096
        b.ne 1b
        ldr x6, =0x0700000044fff000       // the last page of 80 MiB: 7
        mov x4, 128
2:      st2g x6, [x6], 32
        subs x4, x4, 1
        b.ne 2b
        ldr x0, =0x40180000               // and this word says that it is done
        mov w1, 0x600d
        str w1, [x0]
3:      wfi
        b 3b
        .balign 4096
table:  .skip 4096
