/*
 * A program that tags memory of its own and keeps checking it, for tests.
 *
 *   tagged [--kib N] [--threads N] [--churn]
 *
 * It maps memory with PROT_MTE in every possible way, tags all granules, and then checks them for
 * ever, in N threads (2) besides the main one, loading through tagged pointers as well, with
 * synchronous checks on. It prints
 *
 *   TAGGED map NAME 0xADDRESS SIZE       a mapping, SIZE is N KiB (64)
 *   TAGGED ready
 *   TAGGED check=N wrong=W signals=S disorder=D
 *
 * W counts tags that had changed; S numbered signals (SIGRTMIN), D those that came out of order.
 * On SIGUSR1 it executes itself; on SIGUSR2 it gives four granules of `scratch` the tag 15. With
 * --churn it creates one thread after another, and each ends at once.
 *
 *   tagged --at [--no-mte] ADDRESS:SIZE[:ro] ...
 *
 * maps just that memory, with or without PROT_MTE, prints "ready" and runs until its standard
 * input ends.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/personality.h>
#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>

enum { GRANULE = 16, PROT_MEMORY_TAGS = 0x20, GAP = 1 << 16, RW = PROT_READ | PROT_WRITE };
enum { TCF_SYNC = 2, ALL_TAGS = 0xfffe << 3 };

struct map {
	const char *name;
	int flags, protection, memfd, later, checked;
	char *at;
};

/* `later` is the protection after the tags are set; scratch and those after it are not checked. */
static struct map maps[] = {
	{ "private", MAP_PRIVATE | MAP_ANONYMOUS, RW, 0, RW, 1, NULL },
	{ "shared", MAP_SHARED | MAP_ANONYMOUS, RW, 0, RW, 1, NULL },
	{ "memfd", MAP_SHARED, RW, 1, RW, 1, NULL },
	{ "mirror", MAP_SHARED, PROT_READ, 1, PROT_READ, 1, NULL }, /* of memfd */
	{ "copied", MAP_PRIVATE, RW, 2, RW, 1, NULL },
	{ "sealed", MAP_PRIVATE | MAP_ANONYMOUS, RW, 0, PROT_READ, 1, NULL },
	{ "scratch", MAP_PRIVATE | MAP_ANONYMOUS, RW, 0, RW, 0, NULL },
	{ "hidden", MAP_PRIVATE | MAP_ANONYMOUS, RW, 0, PROT_NONE, 0, NULL },
	{ "untouched", MAP_PRIVATE | MAP_ANONYMOUS, 0, 0, RW, 0, NULL },
	{ "reserved", MAP_PRIVATE | MAP_ANONYMOUS, -1, 0, PROT_NONE, 0, NULL },
	{ "plain", MAP_PRIVATE | MAP_ANONYMOUS, -1, 0, RW, 0, NULL },
};
enum { N_MAPS = sizeof(maps) / sizeof(maps[0]), SCRATCH = 6 };

static size_t size = 64 << 10;
static volatile size_t wrong, signals, disorder;

static void need(int good, const char *what)
{
	if (!good) {
		perror(what);
		exit(1);
	}
}

static unsigned expected(size_t granule)
{
	return (granule * 7 + granule / 256 + 3) & 15;
}

static void set_tag(char *address, unsigned tag)
{
	char *tagged = (char *)((uintptr_t)address | (uintptr_t)tag << 56);
	__asm__ volatile("stg %0, [%0]" : : "r"(tagged) : "memory");
}

static char *with_its_tag(char *address)
{
	__asm__ volatile("ldg %0, [%0]" : "+r"(address) : : "memory");
	return address;
}

static void look(const struct map *map)
{
	for (size_t i = 0; i < size / GRANULE; i++) {
		char *tagged = with_its_tag(map->at + i * GRANULE);
		if (((uintptr_t)tagged >> 56 & 15) != expected(i) || *(volatile char *)tagged)
			__atomic_fetch_add(&wrong, 1, __ATOMIC_RELAXED);
	}
}

static void *look_for_ever(void *unused)
{
	/* Not all the time: the command that works on it needs the CPU, too. */
	for (struct timespec rest = { 0, 10 * 1000 * 1000 }; !unused; nanosleep(&rest, NULL))
		for (int i = 0; i < N_MAPS; i++)
			if (maps[i].checked)
				look(&maps[i]);
	return unused;
}

static void *nothing(void *argument)
{
	return argument;
}

static void map_all(void)
{
	int fds[3] = { -1, memfd_create("tagged", 0), memfd_create("copied", 0) };
	need(ftruncate(fds[1], size) == 0 && ftruncate(fds[2], size) == 0, "memfd");
	char *room = mmap(NULL, N_MAPS * (size + GAP), PROT_NONE,
			  MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	need(room != MAP_FAILED, "mmap");
	for (int i = 0; i < N_MAPS; i++) {
		struct map *map = &maps[i];
		int tagged = map->protection >= 0, touched = map->protection > 0;
		int protection = touched ? map->protection : RW;
		map->at = mmap(room + i * (size + GAP), size,
			       protection | (tagged ? PROT_MEMORY_TAGS : 0),
			       map->flags | MAP_FIXED, fds[map->memfd], 0);
		need(map->at != MAP_FAILED, map->name);
		for (size_t g = 0; touched && protection == RW && g < size / GRANULE; g++)
			set_tag(map->at + g * GRANULE, expected(g));
		if (map->later == PROT_NONE && !tagged)
			memset(map->at, 1, size); /* pages that never had tags */
		if (map->later != protection)
			need(mprotect(map->at, size, map->later | PROT_MEMORY_TAGS) == 0, "mprotect");
		printf("TAGGED map %s %p %zu\n", map->name, (void *)map->at, size);
	}
}

static void on_signal(int number, siginfo_t *info, void *context)
{
	(void)context;
	if (number == SIGRTMIN) {
		disorder += (size_t)info->si_value.sival_int != signals;
		signals++;
	} else if (number == SIGUSR2) {
		for (size_t i = 4; i < 8; i++)
			set_tag(maps[SCRATCH].at + i * GRANULE, 15);
	} else {
		execl("/proc/self/exe", "tagged", NULL);
	}
}

static void catch(int number)
{
	struct sigaction action = { .sa_sigaction = on_signal, .sa_flags = SA_SIGINFO };
	need(sigaction(number, &action, NULL) == 0, "sigaction");
}

static void map_at(int argc, char **argv, char **environment)
{
	/* The heap must not lie where the memory is wanted. */
	int old = personality(0xffffffff);
	if (!(old & ADDR_NO_RANDOMIZE)) {
		need(personality(old | ADDR_NO_RANDOMIZE) >= 0, "personality");
		execve("/proc/self/exe", argv, environment);
		need(0, "execve");
	}
	int tags = PROT_MEMORY_TAGS, at = 2;
	if (at < argc && !strcmp(argv[at], "--no-mte"))
		tags = 0, at++;
	for (; at < argc; at++) {
		char *rest;
		uintptr_t address = strtoull(argv[at], &rest, 0);
		size_t length = *rest == ':' ? strtoull(rest + 1, &rest, 0) : 0;
		int readonly = strcmp(rest, ":ro") == 0;
		/* Not even a tracer can write to memory that is shared and read-only. */
		int flags = (readonly ? MAP_SHARED : MAP_PRIVATE) | MAP_ANONYMOUS | MAP_NORESERVE;
		void *memory = mmap((void *)address, length, (readonly ? PROT_READ : RW) | tags,
				    flags | MAP_FIXED_NOREPLACE, -1, 0);
		need(memory != MAP_FAILED, argv[at]);
	}
	puts("ready");
	fflush(stdout);
	char byte;
	while (read(0, &byte, 1) > 0)
		;
	exit(0);
}

int main(int argc, char **argv, char **environment)
{
	int threads = 2, churn = 0;
	if (argc > 1 && !strcmp(argv[1], "--at"))
		map_at(argc, argv, environment);
	for (int i = 1; i < argc; i++) {
		if (!strcmp(argv[i], "--kib") && i + 1 < argc)
			size = (size_t)atoi(argv[++i]) << 10;
		else if (!strcmp(argv[i], "--threads") && i + 1 < argc)
			threads = atoi(argv[++i]);
		else if (!strcmp(argv[i], "--churn"))
			churn = 1;
	}
	setvbuf(stdout, NULL, _IOLBF, 0);
	need(prctl(PR_SET_TAGGED_ADDR_CTRL, 1 | TCF_SYNC | ALL_TAGS, 0, 0, 0) == 0, "prctl");
	map_all();
	catch(SIGRTMIN);
	catch(SIGUSR1);
	catch(SIGUSR2);
	/* Numbered signals go to the main thread: two threads would take them in any order. */
	sigset_t numbered;
	sigemptyset(&numbered);
	sigaddset(&numbered, SIGRTMIN);
	pthread_sigmask(SIG_BLOCK, &numbered, NULL);
	for (int i = 0; i < threads; i++) {
		pthread_t thread;
		need(pthread_create(&thread, NULL, look_for_ever, NULL) == 0, "pthread_create");
	}
	pthread_sigmask(SIG_UNBLOCK, &numbered, NULL);
	puts("TAGGED ready");
	for (unsigned long check = 1;; check++) {
		for (int i = 0; i < N_MAPS; i++)
			if (maps[i].checked)
				look(&maps[i]);
		printf("TAGGED check=%lu wrong=%zu signals=%zu disorder=%zu\n", check, wrong, signals,
		       disorder);
		pthread_t thread;
		for (int i = 0; churn && i < 20; i++)
			need(!pthread_create(&thread, NULL, nothing, NULL) &&
				     !pthread_join(thread, NULL), "churn");
		struct timespec rest = { 0, 50 * 1000 * 1000 };
		while (nanosleep(&rest, &rest) && errno == EINTR)
			;
	}
}
