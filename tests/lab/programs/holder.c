/*
 * A VMM whose main thread keeps known values in registers, or sits in a system call, and counts
 * what changes behind its back.
 *
 *   holder MODE FILE
 *
 * FILE holds the counts, as struct counts below. The program prints "ready", or "no MODE" if the
 * CPU or the kernel lacks what the mode needs, and runs until it is killed.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <linux/kvm.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/auxv.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/rseq.h>
#include <sys/syscall.h>
#include <time.h>
#include <ucontext.h>
#include <unistd.h>

struct counts {
	uint64_t rounds;  /* loops, or calls that returned */
	uint64_t changed; /* values that had changed */
	uint64_t early;	  /* calls that returned too early, or with an unexpected result */
	uint64_t late_ms; /* how long the longest call took beyond its timeout */
	uint64_t signals;
	uint64_t disorder; /* signals that were lost, duplicated or out of order */
	uint64_t unbroken; /* signals that did not interrupt the wait they came in */
};

static struct counts *counts;
static void *pages[2]; /* registers are loaded from the first, and stored to the second */
enum { SPIN = 300000, SLEEP_MS = 2000, VECTORS = 65536 };

static void need(int good, const char *what)
{
	if (!good) {
		perror(what);
		exit(1);
	}
}

static void lacks(const char *mode)
{
	printf("no %s\n", mode);
	fflush(stdout);
	exit(3);
}

static void fill(void)
{
	static uint32_t seed = 1;
	uint32_t *words = pages[0];
	for (size_t i = 0; i < VECTORS / 4; i++)
		words[i] = seed = seed * 1664525 + 1013904223;
	memset(pages[1], 0, VECTORS);
}

static void compare(size_t from, size_t to)
{
	counts->changed += memcmp((char *)pages[0] + from, (char *)pages[1] + from, to - from) != 0;
	counts->rounds++;
}

/* Registers that the loop needs: x9 spins, x10 and x11 are the pages. */
#define SPINNING "mov x9, %2\n1: subs x9, x9, #1\nb.ne 1b\n"
#define INPUTS : : "r"(pages[0]), "r"(pages[1]), "r"((uint64_t)SPIN)
#define ALL_X "x12", "x13", "x14", "x15", "x16", "x17", "x20", "x21", "x22", "x23", "x24", "x25", \
	"x26", "x27", "x28", "x30"
#define ALL_V "v0", "v1", "v2", "v3", "v4", "v5", "v6", "v7", "v8", "v9", "v10", "v11", "v12", \
	"v13", "v14", "v15", "v16", "v17", "v18", "v19", "v20", "v21", "v22", "v23", "v24", "v25", \
	"v26", "v27", "v28", "v29", "v30", "v31"

static void hold_general(void)
{
	fill();
	((uint64_t *)pages[0])[26] = 0xa0000000; /* N and C */
	register uint64_t in __asm__("x10") = (uint64_t)pages[0];
	register uint64_t out __asm__("x11") = (uint64_t)pages[1];
	__asm__ volatile(
		"ldp x0, x1, [%0]\nldp x2, x3, [%0, #16]\nldp x4, x5, [%0, #32]\n"
		"ldp x6, x7, [%0, #48]\nldp x8, x12, [%0, #64]\nldp x13, x14, [%0, #80]\n"
		"ldp x15, x16, [%0, #96]\nldp x17, x20, [%0, #112]\nldp x21, x22, [%0, #128]\n"
		"ldp x23, x24, [%0, #144]\nldp x25, x26, [%0, #160]\nldp x27, x28, [%0, #176]\n"
		"ldr x30, [%0, #192]\nmov x9, #1\nlsl x9, x9, #18\n"
		"mov x19, sp\nstr x19, [%0, #200]\nldr x19, [%0, #208]\nmsr nzcv, x19\n"
		"1: sub x9, x9, #1\ncbnz x9, 1b\n"
		"stp x0, x1, [%1]\nstp x2, x3, [%1, #16]\nstp x4, x5, [%1, #32]\n"
		"stp x6, x7, [%1, #48]\nstp x8, x12, [%1, #64]\nstp x13, x14, [%1, #80]\n"
		"stp x15, x16, [%1, #96]\nstp x17, x20, [%1, #112]\nstp x21, x22, [%1, #128]\n"
		"stp x23, x24, [%1, #144]\nstp x25, x26, [%1, #160]\nstp x27, x28, [%1, #176]\n"
		"str x30, [%1, #192]\nmrs x9, nzcv\nstr x9, [%1, #208]\nmov x9, sp\n"
		"str x9, [%1, #200]\n"
		: : "r"(in), "r"(out)
		: "x0", "x1", "x2", "x3", "x4", "x5", "x6", "x7", "x8", "x9", "x19", ALL_X, "cc",
		  "memory");
	compare(0, 27 * 8);
}

static void hold_fp(void)
{
	fill();
	((uint32_t *)pages[0])[128] = 0x08000015;	/* FPSR: QC and exception flags */
	((uint32_t *)pages[0])[129] = 0x00c00000;	/* FPCR: round to zero */
	__asm__ volatile(
		"ldp q0, q1, [%0]\nldp q2, q3, [%0, #32]\nldp q4, q5, [%0, #64]\n"
		"ldp q6, q7, [%0, #96]\nldp q8, q9, [%0, #128]\nldp q10, q11, [%0, #160]\n"
		"ldp q12, q13, [%0, #192]\nldp q14, q15, [%0, #224]\nldp q16, q17, [%0, #256]\n"
		"ldp q18, q19, [%0, #288]\nldp q20, q21, [%0, #320]\nldp q22, q23, [%0, #352]\n"
		"ldp q24, q25, [%0, #384]\nldp q26, q27, [%0, #416]\nldp q28, q29, [%0, #448]\n"
		"ldp q30, q31, [%0, #480]\nldr w9, [%0, #512]\nmsr fpsr, x9\n"
		"ldr w9, [%0, #516]\nmsr fpcr, x9\n" SPINNING
		"stp q0, q1, [%1]\nstp q2, q3, [%1, #32]\nstp q4, q5, [%1, #64]\n"
		"stp q6, q7, [%1, #96]\nstp q8, q9, [%1, #128]\nstp q10, q11, [%1, #160]\n"
		"stp q12, q13, [%1, #192]\nstp q14, q15, [%1, #224]\nstp q16, q17, [%1, #256]\n"
		"stp q18, q19, [%1, #288]\nstp q20, q21, [%1, #320]\nstp q22, q23, [%1, #352]\n"
		"stp q24, q25, [%1, #384]\nstp q26, q27, [%1, #416]\nstp q28, q29, [%1, #448]\n"
		"stp q30, q31, [%1, #480]\nmrs x9, fpsr\nstr w9, [%1, #512]\n"
		"mrs x9, fpcr\nstr w9, [%1, #516]\nmsr fpcr, xzr\n"
		INPUTS : "x9", ALL_V, "cc", "memory");
	compare(0, 520);
}

#define EACH32(what) what(0) what(1) what(2) what(3) what(4) what(5) what(6) what(7) what(8) \
	what(9) what(10) what(11) what(12) what(13) what(14) what(15) what(16) what(17) what(18) \
	what(19) what(20) what(21) what(22) what(23) what(24) what(25) what(26) what(27) what(28) \
	what(29) what(30) what(31)
#define EACH16(what) what(0) what(1) what(2) what(3) what(4) what(5) what(6) what(7) what(8) \
	what(9) what(10) what(11) what(12) what(13) what(14) what(15)
#define LOAD_Z(n) "ldr z" #n ", [%0, #" #n ", mul vl]\n"
#define STORE_Z(n) "str z" #n ", [%1, #" #n ", mul vl]\n"
/* Predicates after the vectors: at 32 * VL from the page's start. */
#define LOAD_P(n) "ldr p" #n ", [x10, #" #n ", mul vl]\n"
#define STORE_P(n) "str p" #n ", [x11, #" #n ", mul vl]\n"

static void hold_sve(void)
{
	uint64_t bytes;
	__asm__(".arch armv8.5-a+sve\nrdvl %0, #1" : "=r"(bytes));
	fill();
	memset((char *)pages[0] + 34 * bytes, 0xff, bytes / 8);	/* a legal first-fault register */
	__asm__ volatile(".arch armv8.5-a+sve\n"
		"rdvl x9, #1\nadd x10, %0, x9, lsl #5\nadd x11, %1, x9, lsl #5\n"
		"add x12, x10, x9, lsl #1\nadd x13, x11, x9, lsl #1\n"
		"ldr p0, [x12]\nwrffr p0.b\n" EACH32(LOAD_Z) EACH16(LOAD_P) SPINNING
		EACH32(STORE_Z) EACH16(STORE_P) "rdffr p0.b\nstr p0, [x13]\n"
		INPUTS : "x9", "x10", "x11", "x12", "x13", ALL_V, "cc", "memory");
	compare(0, 34 * bytes + bytes / 8);
}

/* Streaming mode for a while: the same registers, with another vector length. */
static void hold_ssve(void)
{
	uint64_t bytes;
	__asm__(".arch armv9-a+sme\nrdsvl %0, #1" : "=r"(bytes));
	fill();
	__asm__ volatile(".arch armv9-a+sme\nsmstart sm\n"
		"rdvl x9, #1\nadd x10, %0, x9, lsl #5\nadd x11, %1, x9, lsl #5\n"
		EACH32(LOAD_Z) EACH16(LOAD_P) SPINNING EACH32(STORE_Z) EACH16(STORE_P)
		"smstop sm\n"
		INPUTS : "x9", "x10", "x11", ALL_V, "cc", "memory");
	compare(0, 34 * bytes);
}

/* ZA, TPIDR2, ZT0 (with SME2) and FPMR: all of them outlive a system call. */
static void hold_za(int sme2, int fpmr)
{
	uint64_t bytes;
	__asm__(".arch armv9-a+sme\nrdsvl %0, #1" : "=r"(bytes));
	fill();
	__asm__ volatile(".arch armv9-a+sme\n"
		"smstart za\nmov w12, #0\nmov x10, %0\n"
		"2: ldr za[w12, #0], [x10]\nadd x10, x10, %4\nadd w12, w12, #1\n"
		"cmp x12, %4\nb.ne 2b\n"
		"cbz %w3, 3f\n.inst 0xe11f8000 | (10 << 5)\nadd x10, x10, #64\n3:\n"
		"ldr x13, [x10]\nmsr s3_3_c13_c0_5, x13\n" SPINNING
		"mov w12, #0\nmov x10, %1\n"
		"2: str za[w12, #0], [x10]\nadd x10, x10, %4\nadd w12, w12, #1\n"
		"cmp x12, %4\nb.ne 2b\n"
		"cbz %w3, 3f\n.inst 0xe13f8000 | (10 << 5)\nadd x10, x10, #64\n3:\n"
		"mrs x13, s3_3_c13_c0_5\nstr x13, [x10]\nmsr s3_3_c13_c0_5, xzr\nsmstop za\n"
		: : "r"(pages[0]), "r"(pages[1]), "r"((uint64_t)SPIN), "r"(sme2), "r"(bytes)
		: "x9", "x10", "x12", "x13", ALL_V, "cc", "memory");
	compare(0, bytes * bytes + (sme2 ? 64 : 0) + 8);
	if (fpmr) {
		uint64_t want = 0x124, have; /* formats of 8-bit numbers */
		__asm__ volatile("msr s3_3_c4_c4_2, %1\nmov x9, %2\n1: subs x9, x9, #1\nb.ne 1b\n"
				 "mrs %0, s3_3_c4_c4_2\nmsr s3_3_c4_c4_2, xzr"
				 : "=&r"(have) : "r"(want), "r"((uint64_t)SPIN) : "x9", "cc");
		counts->changed += have != want;
	}
}

/* Indirect branches: BTYPE is set if the thread stops right after one. */
static void hold_btype(void)
{
	__asm__ volatile("mov x9, %0\nadr x10, 2f\nb 1f\n2: bti c\nsubs x9, x9, #1\nret\n"
			 "1: blr x10\nb.ne 1b\n"
			 : : "r"((uint64_t)SPIN) : "x9", "x10", "x30", "cc");
	counts->rounds++;
}

/* A pointer that is signed and, a while later, authenticated; and the thread's own pointers. */
static void hold_pointers(void)
{
	uint64_t pointer = (uint64_t)pages[0], before, after;
	__asm__ volatile("mov x12, %2\nmrs %0, tpidr_el0\nmov x11, sp\npacia x12, x11\n"
			 "mov x9, %3\n1: pacga x10, x9, x11\nsubs x9, x9, #1\nb.ne 1b\n"
			 "autia x12, x11\nmrs %1, tpidr_el0\nsub x12, x12, %2\neor %0, %0, x12\n"
			 : "=&r"(before), "=&r"(after)
			 : "r"(pointer), "r"((uint64_t)SPIN)
			 : "x9", "x10", "x11", "x12", "cc");
	counts->changed += before != after;
	counts->rounds++;
}

/*
 * A restartable sequence that notices if the thread left it and came back: the kernel clears
 * rseq_cs when the thread returns to user space outside the sequence.
 */
static void hold_rseq(void)
{
	struct rseq *area = (void *)((char *)__builtin_thread_pointer() + __rseq_offset);
	uint64_t left;
	__asm__ volatile(
		".pushsection __rseq_cs, \"aw\"\n.balign 32\n9: .long 0, 0\n"
		".quad 1f, 2f - 1f, 4f\n.popsection\n"
		"b 5f\n.long 0xd428bc00\n4: mov %0, #1\nb 3f\n"	/* RSEQ_SIG before the abort */
		"5: mov %0, #0\nadrp x10, 9b\nadd x10, x10, :lo12:9b\nstr x10, [%1, #8]\n"
		"1: mov x9, %2\n6: subs x9, x9, #1\nb.ne 6b\n"
		"ldr x10, [%1, #8]\ncbnz x10, 2f\nmov %0, #2\n"
		"2: nop\n3: str xzr, [%1, #8]\nmov x9, %2\n7: subs x9, x9, #1\nb.ne 7b\n"
		: "=&r"(left) : "r"(area), "r"((uint64_t)SPIN / 16) : "x9", "x10", "cc", "memory");
	counts->changed += left == 2;
	counts->rounds++;
}

/* A restartable sequence that the thread never leaves; the abort leads back into it. */
static void hold_rseq_for_ever(void)
{
	struct rseq *area = (void *)((char *)__builtin_thread_pointer() + __rseq_offset);
	__asm__ volatile(
		".pushsection __rseq_cs, \"aw\"\n.balign 32\n9: .long 0, 0\n"
		".quad 1f, 2f - 1f, 4f\n.popsection\n"
		"b 4f\n.long 0xd428bc00\n4: adrp x10, 9b\nadd x10, x10, :lo12:9b\nstr x10, [%0, #8]\n"
		"1: ldr x9, [%1]\nadd x9, x9, #1\nstr x9, [%1]\nb 1b\n2: nop\n"
		: : "r"(area), "r"(&counts->rounds) : "x9", "x10", "cc", "memory");
}

enum { STACK = 5120, BELOW = 32768, ROOM = 65536, PAGE = 65536 }; /* the largest page size */
static char *below; /* the memory below a stack that is too small */

static void hold_on_this_stack(void)
{
	for (;;) {
		hold_general();
		for (size_t i = 0; below && i < BELOW; i++)
			counts->changed += below[i] != 0x5a;
	}
}

/* Move the main thread to another stack: a small one inside the heap, or one with a guard page. */
static void hold_on_stack(const char *mode)
{
	static ucontext_t here, there;
	need(getcontext(&there) == 0, "getcontext");
	char *stack;
	if (!strcmp(mode, "stack-in-heap")) {
		below = malloc(BELOW + STACK);
		memset(below, 0x5a, BELOW);
		stack = below + BELOW;
	} else {
		stack = mmap(NULL, PAGE + ROOM, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS,
			     -1, 0);
		need(stack != MAP_FAILED && mprotect(stack, PAGE, PROT_NONE) == 0, "mprotect");
		stack += PAGE;
	}
	there.uc_stack.ss_sp = stack;
	there.uc_stack.ss_size = below ? (size_t)STACK : (size_t)ROOM;
	puts("ready");
	fflush(stdout);
	makecontext(&there, hold_on_this_stack, 0);
	swapcontext(&here, &there);
}

/* Never returns: the callers' frames are not on the guarded stack. */
static void hold_gcs(void)
{
	register uint64_t x0 __asm__("x0") = 75; /* PR_SET_SHADOW_STACK_STATUS */
	register uint64_t x1 __asm__("x1") = 1;
	register uint64_t x2 __asm__("x2") = 0;
	register uint64_t x3 __asm__("x3") = 0;
	register uint64_t x4 __asm__("x4") = 0;
	register uint64_t x8 __asm__("x8") = SYS_prctl;
	__asm__ volatile("svc #0" : "+r"(x0) : "r"(x1), "r"(x2), "r"(x3), "r"(x4), "r"(x8) : "memory");
	if (x0 != 0)
		lacks("gcs");
	puts("ready");
	fflush(stdout);
	for (;;)
		hold_general();
}

static uint64_t now_ms(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000 + t.tv_nsec / 1000000;
}

/* A system call as C libraries make it: the number is loaded right before the svc. */
#define CALL(number, a, b, c, d) ({ \
	register long x0 __asm__("x0") = (long)(a); \
	register long x1 __asm__("x1") = (long)(b); \
	register long x2 __asm__("x2") = (long)(c); \
	register long x3 __asm__("x3") = (long)(d); \
	__asm__ volatile("mov x8, %1\nsvc #0" : "+r"(x0) : "i"(number), "r"(x1), "r"(x2), "r"(x3) \
			 : "x8", "memory"); \
	x0; })

static const struct timespec NAP = { SLEEP_MS / 1000, SLEEP_MS % 1000 * 1000000 };

static long call(const char *mode)
{
	static int ends[2] = { -1, -1 }, epoll = -1;
	static uint32_t word;
	struct pollfd fd = { .events = POLLIN };
	struct epoll_event event;
	struct timespec end;
	char byte;
	if (ends[0] < 0) {
		need(pipe(ends) == 0, "pipe");
		epoll = epoll_create1(0);
		event.events = EPOLLIN;
		need(epoll_ctl(epoll, EPOLL_CTL_ADD, ends[0], &event) == 0, "epoll_ctl");
	}
	fd.fd = ends[0];
	if (!strcmp(mode, "nanosleep"))
		return CALL(SYS_nanosleep, &NAP, NULL, 0, 0);
	if (!strcmp(mode, "clock_nanosleep"))
		return clock_nanosleep(CLOCK_BOOTTIME, 0, &NAP, NULL);
	if (!strcmp(mode, "clock_nanosleep-absolute")) {
		clock_gettime(CLOCK_MONOTONIC, &end);
		end.tv_nsec += SLEEP_MS % 1000 * 1000000;
		end.tv_sec += SLEEP_MS / 1000 + end.tv_nsec / 1000000000;
		end.tv_nsec %= 1000000000;
		return clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &end, NULL);
	}
	if (!strcmp(mode, "ppoll"))
		return ppoll(&fd, 1, &NAP, NULL);
	if (!strcmp(mode, "pselect")) {
		end = NAP;
		return syscall(SYS_pselect6, 0, NULL, NULL, NULL, &end, NULL);
	}
	if (!strcmp(mode, "futex")) {
		long result = CALL(SYS_futex, &word, FUTEX_WAIT, 0, &NAP);
		return result == -ETIMEDOUT ? 0 : result;
	}
	if (!strcmp(mode, "epoll"))
		return epoll_wait(epoll, &event, 1, SLEEP_MS);
	if (!strcmp(mode, "sigtimedwait")) {
		sigset_t set;
		sigemptyset(&set);
		sigaddset(&set, SIGUSR2);
		long result = sigtimedwait(&set, NULL, &NAP);
		return result < 0 && errno == EAGAIN ? 0 : result;
	}
	if (!strcmp(mode, "read"))
		return read(ends[0], &byte, 1);
	if (!strcmp(mode, "ppoll-for-ever"))
		return ppoll(&fd, 1, NULL, NULL);
	if (!strcmp(mode, "futex-for-ever"))
		return CALL(SYS_futex, &word, FUTEX_WAIT, 0, NULL);
	lacks(mode);
	return 0;
}

static void hold_call(const char *mode)
{
	uint64_t before = now_ms();
	long result = call(mode);
	uint64_t took = now_ms() - before;
	counts->early += result != 0 || took < SLEEP_MS;
	if (took > SLEEP_MS && took - SLEEP_MS > counts->late_ms)
		counts->late_ms = took - SLEEP_MS;
	counts->rounds++;
}

/* Each signal has the next number. One that finds its wait about to restart is counted, too. */
static void on_signal(int number, siginfo_t *info, void *context)
{
	const mcontext_t *at = &((ucontext_t *)context)->uc_mcontext;
	(void)number;
	counts->unbroken += at->regs[8] == SYS_ppoll && *(uint32_t *)at->pc == 0xd4000001;
	counts->disorder += (uint64_t)info->si_value.sival_int != counts->signals;
	counts->signals++;
}

static void hold_signals(void)
{
	struct timespec second = { 1, 0 };
	ppoll(NULL, 0, &second, NULL);
	counts->rounds++;
}

static void open_vm(void)
{
	int kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
	need(kvm >= 0, "/dev/kvm");
	int vm = ioctl(kvm, KVM_CREATE_VM, 0);
	need(vm >= 0, "KVM_CREATE_VM");
	struct kvm_enable_cap cap = { .cap = KVM_CAP_ARM_MTE };
	need(ioctl(vm, KVM_ENABLE_CAP, &cap) == 0, "KVM_CAP_ARM_MTE");
	size_t size = 1 << 20;
	void *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	need(memory != MAP_FAILED, "mmap");
	struct kvm_userspace_memory_region region = {
		.guest_phys_addr = 0x40000000,
		.memory_size = size,
		.userspace_addr = (uintptr_t)memory,
	};
	need(ioctl(vm, KVM_SET_USER_MEMORY_REGION, &region) == 0, "memslot");
}

int main(int argc, char **argv)
{
	need(argc == 3, "usage: holder MODE FILE");
	const char *mode = argv[1];
	int file = open(argv[2], O_RDWR | O_CREAT | O_TRUNC, 0600);
	need(file >= 0 && ftruncate(file, 4096) == 0, argv[2]);
	counts = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
	for (int i = 0; i < 2; i++)
		pages[i] = mmap(NULL, 2 * VECTORS, PROT_READ | PROT_WRITE,
				MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
	need(counts != MAP_FAILED && pages[0] != MAP_FAILED && pages[1] != MAP_FAILED, "mmap");
	open_vm();
	int sve = (getauxval(AT_HWCAP) >> 22 & 1), sme = getauxval(AT_HWCAP2) >> 23 & 1;
	int sme2 = getauxval(AT_HWCAP2) >> 37 & 1, fpmr = getauxval(AT_HWCAP2) >> 48 & 1;
	if (!strcmp(mode, "gcs"))
		hold_gcs();
	if (!strncmp(mode, "stack-", 6))
		hold_on_stack(mode);
	if ((!strncmp(mode, "sve", 3) && !sve) || (!strcmp(mode, "za") && !sme) ||
	    (!strncmp(mode, "ssve", 4) && !sme))
		lacks(mode);
	if (!strcmp(mode, "sve-long"))
		need(prctl(PR_SVE_SET_VL, 256) >= 0, "PR_SVE_SET_VL");
	if (!strcmp(mode, "signals")) {
		struct sigaction action = { .sa_sigaction = on_signal, .sa_flags = SA_SIGINFO | SA_RESTART };
		need(sigaction(SIGRTMIN, &action, NULL) == 0, "sigaction");
	}
	puts("ready");
	fflush(stdout);
	for (;;) {
		if (!strcmp(mode, "plain")) {
			hold_general();
			hold_pointers();
			hold_btype();
		} else if (!strcmp(mode, "fp"))
			hold_fp();
		else if (!strcmp(mode, "sve") || !strcmp(mode, "sve-long"))
			hold_sve();
		else if (!strcmp(mode, "ssve"))
			hold_ssve();
		else if (!strcmp(mode, "ssve-at-times")) {
			hold_ssve();
			hold_general();
		} else if (!strcmp(mode, "za"))
			hold_za(sme2, fpmr);
		else if (!strcmp(mode, "rseq"))
			hold_rseq();
		else if (!strcmp(mode, "rseq-for-ever"))
			hold_rseq_for_ever();
		else if (!strcmp(mode, "signals"))
			hold_signals();
		else
			hold_call(mode);
	}
}
