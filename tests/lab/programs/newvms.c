/*
 * A program that makes VMs, each with a vCPU at once, and says which of them have MTE.
 *
 *   newvms [--thread] [--fork] [--deny] [--handler] COUNT
 *
 *   vm N mte=0|1        a VM was made, and has MTE or not
 *   vm N errno=E        KVM_CREATE_VM failed
 *   ready               all were made
 *
 * With --thread another thread makes them, one that blocks all signals; with --fork a child
 * does, and the parent waits for it; --deny sets a seccomp filter first that kills at
 * KVM_ENABLE_CAP; --handler counts SIGUSR1 and SIGURG and says how many came. It lives until
 * its standard input ends, and its status is then 7.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/filter.h>
#include <linux/kvm.h>
#include <linux/seccomp.h>
#include <pthread.h>
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

static volatile sig_atomic_t caught[65];
static int count;

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

static void deny_enable_cap(void)
{
	struct sock_filter code[] = {
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
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

static void *make(void *unused)
{
	(void)unused;
	int kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
	need(kvm >= 0, "/dev/kvm");
	for (int i = 1; i <= count; i++) {
		/* Nothing between the two: whoever comes later comes too late. */
		int vm = ioctl(kvm, KVM_CREATE_VM, 0);
		int made = vm < 0 ? -1 : ioctl(vm, KVM_CREATE_VCPU, 0);
		struct kvm_arm_copy_mte_tags nothing = { .flags = KVM_ARM_TAGS_FROM_GUEST };
		if (vm < 0)
			printf("vm %d errno=%d\n", i, errno);
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

int main(int argc, char **argv)
{
	int thread = 0, fork_first = 0, handler = 0, at = 1;
	for (; at < argc && argv[at][0] == '-'; at++) {
		thread |= !strcmp(argv[at], "--thread");
		fork_first |= !strcmp(argv[at], "--fork");
		handler |= !strcmp(argv[at], "--handler");
		if (!strcmp(argv[at], "--deny"))
			deny_enable_cap();
	}
	count = at < argc ? atoi(argv[at]) : 1;
	if (handler) {
		signal(SIGUSR1, on_signal);
		signal(SIGURG, on_signal);
		for (int i = 0; i < 3; i++)
			raise(SIGUSR1);
		raise(SIGURG);
	}
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
		printf("usr1=%d urg=%d\n", (int)caught[SIGUSR1], (int)caught[SIGURG]);
	puts("ready");
	fflush(stdout);
	char byte;
	while (read(0, &byte, 1) > 0)
		;
	return 7;
}
