/*
 * A VMM that does nothing: a VM with the memslots that its arguments name, for tests.
 *
 *   testvmm [--no-mte] [--vcpus N] [--memfd] IPA:SIZE[:ro] ...
 *
 * It prints "ready" and lives until its standard input ends. Numbers as strtoull takes them.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

static void need(int good, const char *what)
{
	if (!good) {
		perror(what);
		exit(1);
	}
}

static void add_slot(int vm, unsigned slot, const char *argument, int memfd)
{
	char *rest;
	uint64_t ipa = strtoull(argument, &rest, 0);
	uint64_t size = *rest == ':' ? strtoull(rest + 1, &rest, 0) : 0;
	int readonly = strcmp(rest, ":ro") == 0;
	int fd = memfd ? memfd_create("memory", 0) : -1;
	if (memfd)
		need(ftruncate(fd, size) == 0, "ftruncate");
	int flags = memfd ? MAP_SHARED : MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
	void *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, flags, fd, 0);
	need(memory != MAP_FAILED, "mmap");
	struct kvm_userspace_memory_region region = {
		.slot = slot,
		.flags = readonly ? KVM_MEM_READONLY : 0,
		.guest_phys_addr = ipa,
		.memory_size = size,
		.userspace_addr = (uintptr_t)memory,
	};
	need(ioctl(vm, KVM_SET_USER_MEMORY_REGION, &region) == 0, argument);
}

int main(int argc, char **argv)
{
	int mte = 1, memfd = 0, vcpus = 0, at = 1;
	for (; at < argc && argv[at][0] == '-'; at++) {
		if (!strcmp(argv[at], "--no-mte"))
			mte = 0;
		else if (!strcmp(argv[at], "--memfd"))
			memfd = 1;
		else if (!strcmp(argv[at], "--vcpus") && at + 1 < argc)
			vcpus = atoi(argv[++at]);
	}
	int kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
	need(kvm >= 0, "/dev/kvm");
	int vm;
	do /* as QEMU does: a signal may come */
		vm = ioctl(kvm, KVM_CREATE_VM, 0);
	while (vm < 0 && errno == EINTR);
	need(vm >= 0, "KVM_CREATE_VM");
	struct kvm_enable_cap cap = { .cap = KVM_CAP_ARM_MTE };
	if (mte)
		need(ioctl(vm, KVM_ENABLE_CAP, &cap) == 0, "KVM_CAP_ARM_MTE");
	for (unsigned slot = 0; at < argc; at++)
		add_slot(vm, slot++, argv[at], memfd);
	for (int i = 0; i < vcpus; i++)
		need(ioctl(vm, KVM_CREATE_VCPU, i) >= 0, "KVM_CREATE_VCPU");
	puts("ready");
	fflush(stdout);
	char byte;
	while (read(0, &byte, 1) > 0)
		;
	return 0;
}
