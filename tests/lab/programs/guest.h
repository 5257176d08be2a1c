/*
 * Code that the guests of the lab share: process 1 of a small Linux, a pattern of tags in its
 * memory, and what it prints on the serial console.
 */
#pragma once
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/auxv.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum { GRANULE = 16, PAGE = 4096, PER_PAGE = PAGE / GRANULE, PROT_MEMORY_TAGS = 0x20 };
static const unsigned long HAS_MTE = 1UL << 18; /* HWCAP2_MTE */

static inline unsigned expected(size_t granule)
{
	return ((granule % PER_PAGE) * 5 + granule / PER_PAGE) & 15;
}

static inline void set_tag(char *address, unsigned tag)
{
	char *tagged = (char *)((uintptr_t)address | (uintptr_t)tag << 56);
	__asm__ volatile("stg %0, [%0]" : : "r"(tagged) : "memory");
}

static inline unsigned get_tag(char *address)
{
	__asm__ volatile("ldg %0, [%0]" : "+r"(address) : : "memory");
	return (uintptr_t)address >> 56 & 15;
}

static inline void pause_ms(long ms)
{
	struct timespec t = { ms / 1000, ms % 1000 * 1000000 };
	nanosleep(&t, NULL);
}

static inline long option(const char *name, long standard)
{
	static char line[4096];
	int fd = open("/proc/cmdline", O_RDONLY);
	ssize_t n = fd < 0 ? 0 : read(fd, line, sizeof(line) - 1);
	char *at = n > 0 ? strstr(line, name) : NULL;
	if (fd >= 0)
		close(fd);
	return at ? strtol(at + strlen(name), NULL, 10) : standard;
}

static inline void set_up(void)
{
	mkdir("/proc", 0755);
	mkdir("/dev", 0755);
	mount("proc", "/proc", "proc", 0, NULL);
	mount("dev", "/dev", "devtmpfs", 0, NULL);
	int console = open("/dev/ttyAMA0", O_WRONLY);
	if (console >= 0) {
		dup2(console, 1);
		dup2(console, 2);
	}
	setvbuf(stdout, NULL, _IOLBF, 0);
}

static inline void print_ipas(char *memory, size_t pages)
{
	size_t shown = option("tagger.ipas=", 0) ? pages : 16;
	int pagemap = open("/proc/self/pagemap", O_RDONLY);
	for (size_t i = 0; i < pages && i < shown; i++) {
		uint64_t entry = 0;
		off_t at = ((uintptr_t)memory / PAGE + i) * sizeof(entry);
		if (pread(pagemap, &entry, sizeof(entry), at) != sizeof(entry))
			break;
		printf("TAGGER ipa %zu %#lx\n", i, (entry & ((1UL << 55) - 1)) * PAGE);
	}
	close(pagemap);
}

static inline void tag_all(char *memory, size_t granules)
{
	for (size_t i = 0; i < granules; i++)
		set_tag(memory + i * GRANULE, expected(i));
}

static inline size_t count_wrong(char *memory, size_t granules)
{
	size_t wrong = 0;
	for (size_t i = 0; i < granules; i++)
		wrong += get_tag(memory + i * GRANULE) != expected(i);
	return wrong;
}
