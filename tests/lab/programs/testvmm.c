/*
 * A VMM that does nothing: a VM with the memslots that its arguments name, for tests.
 *
 *   testvmm [--no-mte] [--vcpus N] [--memfd] [--data] [--churn] [--run] [--allow CALLS]
 *           [--sqpoll] [--no-vdso] IPA:SIZE[:ro|:memfd] ...
 *
 * It prints "ready" and runs until its standard input ends. Numbers are parsed by strtoull.
 * With --memfd, all memory is of a memfd; with --data, every other page has data other than zeros.
 * With --churn, its main thread creates one thread after another meanwhile, and prints how many.
 * With --run, the main thread, the only one, is a vCPU in an endless loop of the guest. With
 * --allow, a seccomp filter kills it at any other system call; the list is like
 * 222,29:0x8030aeb4, where the number after the colon is the only second argument allowed. With
 * --sqpoll, it has a kernel thread that polls an io_uring all the time; with --no-vdso, the vDSO
 * is not executable.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/filter.h>
#include <linux/io_uring.h>
#include <linux/kvm.h>
#include <linux/seccomp.h>
#include <poll.h>
#include <pthread.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

static void need(int good, const char *what)
{
	if (!good) {
		perror(what);
		exit(1);
	}
}

/* Fill every other page: the kernel may not write pages of zeros to swap. */
static void fill(char *memory, uint64_t size)
{
	uint64_t page = sysconf(_SC_PAGESIZE);
	for (uint64_t at = page; at < size; at += 2 * page)
		*(uint64_t *)(memory + at) = at;
}

static void add_slot(int vm, unsigned slot, const char *argument, int memfd, int data)
{
	char *rest;
	uint64_t ipa = strtoull(argument, &rest, 0);
	uint64_t size = *rest == ':' ? strtoull(rest + 1, &rest, 0) : 0;
	int readonly = strcmp(rest, ":ro") == 0;
	memfd |= strcmp(rest, ":memfd") == 0;
	int fd = memfd ? memfd_create("memory", 0) : -1;
	if (memfd)
		need(ftruncate(fd, size) == 0, "ftruncate");
	int flags = memfd ? MAP_SHARED : MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
	void *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, flags, fd, 0);
	need(memory != MAP_FAILED, "mmap");
	*(uint32_t *)memory = 0x14000000; /* b . */
	if (data)
		fill(memory, size);
	struct kvm_userspace_memory_region region = {
		.slot = slot,
		.flags = readonly ? KVM_MEM_READONLY : 0,
		.guest_phys_addr = ipa,
		.memory_size = size,
		.userspace_addr = (uintptr_t)memory,
	};
	need(ioctl(vm, KVM_SET_USER_MEMORY_REGION, &region) == 0, argument);
}

/* Never returns: the guest's one instruction, a branch to itself, is at `ipa`. */
static void run_vcpu(int kvm, int vm, uint64_t ipa)
{
	struct kvm_vcpu_init init;
	int vcpu = ioctl(vm, KVM_CREATE_VCPU, 0);
	need(vcpu >= 0, "KVM_CREATE_VCPU");
	size_t size = ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0);
	struct kvm_run *run = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, 0);
	need(run != MAP_FAILED, "kvm_run");
	need(ioctl(vm, KVM_ARM_PREFERRED_TARGET, &init) == 0, "KVM_ARM_PREFERRED_TARGET");
	need(ioctl(vcpu, KVM_ARM_VCPU_INIT, &init) == 0, "KVM_ARM_VCPU_INIT");
	struct kvm_one_reg pc = {
		.id = KVM_REG_ARM64 | KVM_REG_SIZE_U64 | KVM_REG_ARM_CORE |
		      KVM_REG_ARM_CORE_REG(regs.pc),
		.addr = (uintptr_t)&ipa,
	};
	need(ioctl(vcpu, KVM_SET_ONE_REG, &pc) == 0, "KVM_SET_ONE_REG");
	for (;;)
		need(ioctl(vcpu, KVM_RUN, 0) == 0 || errno == EINTR, "KVM_RUN");
}

static struct sock_filter code[256];
static unsigned short length;

static void add(unsigned short operation, unsigned k, unsigned char jt, unsigned char jf)
{
	code[length++] = (struct sock_filter){ operation, jt, jf, k };
}

static void allow(unsigned long call, const char *argument)
{
	unsigned skip = argument ? 3 : 1;
	add(BPF_JMP | BPF_JEQ | BPF_K, call, 0, skip);
	if (argument) {
		add(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, args[1]), 0, 0);
		add(BPF_JMP | BPF_JEQ | BPF_K, strtoul(argument, NULL, 0), 0, 1);
	}
	add(BPF_RET | BPF_K, SECCOMP_RET_ALLOW, 0, 0);
	if (argument)
		add(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr), 0, 0);
}

static void be_strict(char *calls)
{
	add(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr), 0, 0);
	allow(__NR_read, NULL);
	allow(__NR_write, NULL);
	allow(__NR_exit_group, NULL);
	for (char *word = strtok(calls, ","); word; word = strtok(NULL, ",")) {
		char *colon = strchr(word, ':');
		allow(strtoul(word, NULL, 0), colon ? colon + 1 : NULL);
	}
	add(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS, 0, 0);
	struct sock_fprog program = { length, code };
	need(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0, "PR_SET_NO_NEW_PRIVS");
	need(prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) == 0, "PR_SET_SECCOMP");
}

static void poll_for_ever(void)
{
	struct io_uring_params params = { .flags = IORING_SETUP_SQPOLL, .sq_thread_idle = 1u << 30 };
	need(syscall(__NR_io_uring_setup, 1, &params) >= 0, "io_uring_setup");
}

static void protect_vdso(void)
{
	/* All of it: the kernel does not split it. */
	unsigned long start, end;
	char line[512];
	FILE *maps = fopen("/proc/self/maps", "r");
	need(maps != NULL, "/proc/self/maps");
	while (fgets(line, sizeof(line), maps))
		if (strstr(line, "[vdso]") && sscanf(line, "%lx-%lx", &start, &end) == 2)
			need(mprotect((void *)start, end - start, PROT_READ) == 0, "mprotect");
	fclose(maps);
}

static void *run_thread(void *argument)
{
	return argument;
}

/* Returns when standard input has ended. */
static void make_threads(void)
{
	struct pollfd input = { .fd = 0, .events = POLLIN };
	unsigned long threads = 0, wrong = 0;
	char byte;
	for (; poll(&input, 1, 0) == 0 || read(0, &byte, 1) > 0; threads++) {
		pthread_t thread;
		void *result = NULL;
		if (pthread_create(&thread, NULL, run_thread, &byte) != 0 ||
		    pthread_join(thread, &result) != 0 || result != &byte)
			wrong++;
	}
	printf("threads=%lu wrong=%lu\n", threads, wrong);
}

int main(int argc, char **argv)
{
	int mte = 1, memfd = 0, data = 0, vcpus = 0, churn = 0, run = 0, at = 1;
	char *calls = NULL;
	for (; at < argc && argv[at][0] == '-'; at++) {
		if (!strcmp(argv[at], "--no-mte"))
			mte = 0;
		else if (!strcmp(argv[at], "--memfd"))
			memfd = 1;
		else if (!strcmp(argv[at], "--data"))
			data = 1;
		else if (!strcmp(argv[at], "--churn"))
			churn = 1;
		else if (!strcmp(argv[at], "--run"))
			run = 1;
		else if (!strcmp(argv[at], "--sqpoll"))
			poll_for_ever();
		else if (!strcmp(argv[at], "--no-vdso"))
			protect_vdso();
		else if (!strcmp(argv[at], "--allow") && at + 1 < argc)
			calls = argv[++at];
		else if (!strcmp(argv[at], "--vcpus") && at + 1 < argc)
			vcpus = atoi(argv[++at]);
	}
	int kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
	need(kvm >= 0, "/dev/kvm");
	int vm;
	do /* as QEMU does: a signal can interrupt it */
		vm = ioctl(kvm, KVM_CREATE_VM, 0);
	while (vm < 0 && errno == EINTR);
	need(vm >= 0, "KVM_CREATE_VM");
	struct kvm_enable_cap cap = { .cap = KVM_CAP_ARM_MTE };
	if (mte)
		need(ioctl(vm, KVM_ENABLE_CAP, &cap) == 0, "KVM_CAP_ARM_MTE");
	for (unsigned slot = 0; at < argc; at++)
		add_slot(vm, slot++, argv[at], memfd, data);
	for (int i = 0; i < vcpus; i++)
		need(ioctl(vm, KVM_CREATE_VCPU, i) >= 0, "KVM_CREATE_VCPU");
	puts("ready");
	fflush(stdout);
	if (calls)
		be_strict(calls);
	if (run)
		run_vcpu(kvm, vm, strtoull(argv[argc - 1], NULL, 0));
	if (churn)
		make_threads();
	char byte;
	while (read(0, &byte, 1) > 0)
		;
	return 0;
}
