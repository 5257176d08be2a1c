/* The bare loop that mtetool is measured against: `copyloop MIB ROUNDS [BYTES [CALLS]]` makes a VM
 * with MTE and MIB of memory, tags all of it, and then reads and writes tags ROUNDS times with
 * nothing between the ioctls, each for BYTES of guest memory (64 MiB): all tags, one ioctl after
 * another, or with CALLS that many of BYTES each, scattered over the memory, each with tags of its
 * own. For each round it prints how many seconds all reading and all writing ioctls took.
 */
#include <err.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>

#define BASE 0x40000000ul

static double
now(void)
{
    struct timespec at;
    clock_gettime(CLOCK_MONOTONIC, &at);
    return (double)at.tv_sec + 1e-9 * (double)at.tv_nsec;
}

/* Makes `calls` copies; the n-th is of the chunk `stride * n`, modulo the memory, and its tags
 * follow those of the one before by `apart`. */
static void
copy(int vm, uint64_t size, uint64_t chunk, uint64_t calls, uint64_t stride, uint8_t *tags,
     uint64_t apart, uint64_t flags)
{
    for (uint64_t n = 0; n < calls; n++) {
        struct kvm_arm_copy_mte_tags copy = {.guest_ipa = BASE + n * stride * chunk % size,
                                             .length = chunk, .addr = tags + n * apart,
                                             .flags = flags};
        if (ioctl(vm, KVM_ARM_MTE_COPY_TAGS, &copy) != (int)chunk)
            err(1, "KVM_ARM_MTE_COPY_TAGS");
    }
}

int
main(int argc, char **argv)
{
    if (argc < 3)
        errx(2, "copyloop MIB ROUNDS [BYTES [CALLS]]");
    uint64_t size = strtoull(argv[1], NULL, 0) << 20;
    uint64_t chunk = argc > 3 ? strtoull(argv[3], NULL, 0) : 64ul << 20;
    int kvm = open("/dev/kvm", O_RDWR), vm = ioctl(kvm, KVM_CREATE_VM, 0);
    struct kvm_enable_cap mte = {.cap = KVM_CAP_ARM_MTE};
    if (vm < 0 || ioctl(vm, KVM_ENABLE_CAP, &mte))
        err(1, "no VM with MTE");
    void *memory =
        mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    struct kvm_userspace_memory_region slot = {
        .guest_phys_addr = BASE, .memory_size = size, .userspace_addr = (uintptr_t)memory};
    if (memory == MAP_FAILED || ioctl(vm, KVM_SET_USER_MEMORY_REGION, &slot))
        err(1, "no memory for the VM");
    int scattered = argc > 4;
    uint64_t calls = scattered ? strtoull(argv[4], NULL, 0) : size / chunk;
    uint64_t stride = scattered ? 7919 : 1, apart = scattered ? chunk / 16 : 0;
    uint64_t n_tags = scattered ? calls * apart : chunk / 16;
    uint8_t *tags = malloc(n_tags);
    if (!tags)
        err(1, "no memory for tags");
    for (uint64_t i = 0; i < n_tags; i++)
        tags[i] = (uint8_t)(i * 7 + i / 256) & 15;
    copy(vm, size, chunk, size / chunk, 1, tags, 0, KVM_ARM_TAGS_TO_GUEST);
    for (long round = strtol(argv[2], NULL, 0); round; round--) {
        double start = now();
        copy(vm, size, chunk, calls, stride, tags, apart, KVM_ARM_TAGS_FROM_GUEST);
        double read = now();
        copy(vm, size, chunk, calls, stride, tags, apart, KVM_ARM_TAGS_TO_GUEST);
        printf("%.6f %.6f\n", read - start, now() - read);
        fflush(stdout);
    }
    return 0;
}
