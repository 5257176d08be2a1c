/*
 * A program that creates VMs, each with a vCPU at once, and prints which of them have MTE.
 *
 *   newvms [--thread] [--fork] [--late] [--again] [--deny] [--keep] [--handler] [--urgent] COUNT
 *
 *   vm N mte=0|1            a VM was created, with MTE or without
 *   vm N errno=E open=M     KVM_CREATE_VM failed, and M VMs are open
 *   ready                   all were created
 *
 * With --thread, another thread, which blocks all signals, creates them; with --fork, a child
 * does, and the parent waits for it; with --late, signals are blocked around KVM_CREATE_VM, so
 * they come some calls later; with --again, a VM is created and closed before each; --deny first
 * sets a seccomp filter that kills at KVM_ENABLE_CAP, --keep one that kills at close as well;
 * --handler counts SIGUSR1, SIGURG and SIGWINCH and prints how many came; with --urgent, another
 * thread sends SIGURG, one after the other, during many ioctls, and the number of lost signals is
 * printed. It runs until its standard input ends; its exit status is then 7.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/filter.h>
#include <linux/kvm.h>
#include <linux/seccomp.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

static volatile sig_atomic_t caught[65], sent, done;
static int count, late, again;
static pthread_t first;

static void need(int good, const char *what)
{
	if (!good) {
		perror(what);
		exit(1);
	}
}

static void on_signal(int number)
{
	caught[number]++;
}

static void deny_enable_cap(int keep)
{
	struct sock_filter code[] = {
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, keep ? SYS_close : SYS_ioctl, keep ? 3 : 0, 0),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_ioctl, 0, 3),
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, args[1])),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, KVM_ENABLE_CAP, 0, 1),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
	};
	struct sock_fprog program = { .len = sizeof(code) / sizeof(code[0]), .filter = code };
	need(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0, "no_new_privs");
	need(prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) == 0, "seccomp");
}

static int open_vms(void)
{
	int found = 0;
	for (int fd = 0; fd < 100; fd++) {
		char name[32], link[32] = "";
		snprintf(name, sizeof(name), "/proc/self/fd/%d", fd);
		found += readlink(name, link, sizeof(link) - 1) > 0 && strstr(link, "kvm-vm");
	}
	return found;
}

static int make_one(int kvm)
{
	sigset_t all, before;
	sigfillset(&all);
	if (late)
		pthread_sigmask(SIG_SETMASK, &all, &before);
	int vm = ioctl(kvm, KVM_CREATE_VM, 0);
	if (late)
		pthread_sigmask(SIG_SETMASK, &before, NULL);
	return vm;
}

static void *make(void *unused)
{
	(void)unused;
	int kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
	need(kvm >= 0, "/dev/kvm");
	for (int i = 1; i <= count; i++) {
		if (again)
			close(ioctl(kvm, KVM_CREATE_VM, 0));
		/* Nothing between the two: anything that happens later is too late. */
		int vm = make_one(kvm);
		int made = vm < 0 ? -1 : ioctl(vm, KVM_CREATE_VCPU, 0);
		struct kvm_arm_copy_mte_tags nothing = { .flags = KVM_ARM_TAGS_FROM_GUEST };
		if (vm < 0)
			printf("vm %d errno=%d open=%d\n", i, errno, open_vms());
		else
			printf("vm %d mte=%d\n", i, !ioctl(vm, KVM_ARM_MTE_COPY_TAGS, &nothing));
		need(vm < 0 || made >= 0, "KVM_CREATE_VCPU");
	}
	return NULL;
}

static void make_in_thread(void)
{
	pthread_t thread;
	sigset_t all, before;
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &before);
	need(pthread_create(&thread, NULL, make, NULL) == 0, "pthread_create");
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	pthread_join(thread, NULL);
}

/* Send the next signal when the last one has come, and none when `done` is set. */
static void *send_urgent(void *unused)
{
	while (!done)
		if (caught[SIGURG] == sent) {
			sent++;
			pthread_kill(first, SIGURG);
		}
	return unused;
}

static void be_urgent(void)
{
	pthread_t thread;
	int kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
	first = pthread_self();
	signal(SIGURG, on_signal);
	need(pthread_create(&thread, NULL, send_urgent, NULL) == 0, "pthread_create");
	for (int i = 0; i < 40; i++)
		ioctl(kvm, KVM_CHECK_EXTENSION, KVM_CAP_USER_MEMORY);
	done = 1;
	pthread_join(thread, NULL);
	sched_yield();
	printf("urgent lost=%d\n", (int)(sent - caught[SIGURG]));
	close(kvm);
}

int main(int argc, char **argv)
{
	int thread = 0, fork_first = 0, handler = 0, deny = 0, keep = 0, urgent = 0, at = 1;
	for (; at < argc && argv[at][0] == '-'; at++) {
		thread |= !strcmp(argv[at], "--thread");
		fork_first |= !strcmp(argv[at], "--fork");
		handler |= !strcmp(argv[at], "--handler");
		late |= !strcmp(argv[at], "--late");
		again |= !strcmp(argv[at], "--again");
		deny |= !strcmp(argv[at], "--deny");
		keep |= !strcmp(argv[at], "--keep");
		urgent |= !strcmp(argv[at], "--urgent");
	}
	if (deny || keep)
		deny_enable_cap(keep);
	count = at < argc ? atoi(argv[at]) : 1;
	if (handler) {
		signal(SIGUSR1, on_signal);
		signal(SIGURG, on_signal);
		signal(SIGWINCH, on_signal);
		for (int i = 0; i < 3; i++)
			raise(SIGUSR1);
		raise(SIGURG);
		raise(SIGWINCH);
	}
	if (urgent)
		be_urgent();
	pid_t child = fork_first ? fork() : 0;
	if (child > 0) {
		int status;
		waitpid(child, &status, 0);
		return WIFEXITED(status) ? WEXITSTATUS(status) : 1;
	}
	if (thread)
		make_in_thread();
	else
		make(NULL);
	if (handler)
		printf("usr1=%d urg=%d winch=%d\n", (int)caught[SIGUSR1], (int)caught[SIGURG],
		       (int)caught[SIGWINCH]);
	puts("ready");
	fflush(stdout);
	char byte;
	while (read(0, &byte, 1) > 0)
		;
	return 7;
}
