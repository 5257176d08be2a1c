/*
 * The guest of the lab: process 1 of a small Linux that tags memory in a known pattern and
 * then checks it for ever, and prints what it finds on the serial console.
 *
 *   TAGGER pages=N page_size=4096        once
 *   TAGGER ipa INDEX 0xADDRESS           the guest physical address of a page, some or all
 *   TAGGER ready                         the pattern is in place
 *   TAGGER check=N granules=G wrong=W data_wrong=D
 *
 * Options on the kernel's command line: tagger.mib=N (4), tagger.ipas=1 (print all pages, not 16),
 * tagger.load=N: that many processes check tagged memory of their own without a pause; the wrong
 * tags that they find count as well.
 */
#include "guest.h"

static void be_load(volatile size_t *wrong)
{
	enum { SIZE = 1 << 20 };
	char *memory = mmap(NULL, SIZE, PROT_READ | PROT_WRITE | PROT_MEMORY_TAGS,
			    MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE | MAP_LOCKED, -1, 0);
	if (memory == MAP_FAILED)
		__atomic_fetch_add(wrong, 1, __ATOMIC_RELAXED);
	else
		tag_all(memory, SIZE / GRANULE);
	for (;;)
		__atomic_fetch_add(wrong, count_wrong(memory, SIZE / GRANULE), __ATOMIC_RELAXED);
}

static volatile size_t *start_load(long processes)
{
	volatile size_t *wrong = mmap(NULL, PAGE, PROT_READ | PROT_WRITE,
				      MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	for (long i = 0; i < processes; i++)
		if (fork() == 0)
			be_load(wrong);
	return wrong;
}

int main(void)
{
	set_up();
	while (!(getauxval(AT_HWCAP2) & HAS_MTE)) {
		puts("TAGGER no-mte");
		pause_ms(1000);
	}
	size_t size = (size_t)option("tagger.mib=", 4) << 20;
	size_t granules = size / GRANULE, pages = size / PAGE;
	char *memory = mmap(NULL, size, PROT_READ | PROT_WRITE | PROT_MEMORY_TAGS,
			    MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE | MAP_LOCKED, -1, 0);
	if (memory == MAP_FAILED) {
		perror("TAGGER mmap");
		pause_ms(1000000);
	}
	tag_all(memory, granules);
	/* Every other page stays all zeros: a migration sends such pages as "zero". */
	for (size_t page = 0; page < pages; page += 2) {
		char *at = memory + page * PAGE;
		*(uint64_t *)((uintptr_t)at | (uintptr_t)expected(page * PER_PAGE) << 56) = page + 1;
	}
	printf("TAGGER pages=%zu page_size=%d\n", pages, PAGE);
	print_ipas(memory, pages);
	volatile size_t *load_wrong = start_load(option("tagger.load=", 0));
	puts("TAGGER ready");
	for (unsigned long check = 1;; check++) {
		size_t wrong = count_wrong(memory, granules) + *load_wrong, data_wrong = 0;
		for (size_t page = 0; page < pages; page++)
			data_wrong += *(uint64_t *)(memory + page * PAGE) != (page % 2 ? 0 : page + 1);
		printf("TAGGER check=%lu granules=%zu wrong=%zu data_wrong=%zu\n", check, granules,
		       wrong, data_wrong);
		pause_ms(250);
	}
}
