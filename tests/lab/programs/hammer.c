/*
 * A guest that hammers its tags, as an allocator does: each of its processes takes one page after
 * another of its own memory, in random order, checks every tag of it, and gives it new ones. It
 * goes on for ever, without a pause, on all vCPUs. Pages differ in how they change:
 *
 *   0  tags and data change together
 *   1  tags change, and the data are zeros for ever
 *   2  tagged at the start, never changed again, and never written
 *   3  tagged and untagged in turn
 *
 * What a page's tags must be is known by its generation, a number in memory without tags. It prints
 * a line like the tagger's for each round over its pages; `wrong` counts all since the start:
 *
 *   TAGGER check=N granules=G wrong=W data_wrong=D
 *
 * Options on the kernel's command line: hammer.mib=N (8) for each process, hammer.processes=N (2),
 * hammer.pause=MS (0) between two pages.
 */
#include "guest.h"
#include <sys/wait.h>

enum { KINDS = 4 };

struct counts {
	size_t pages, wrong, data_wrong;
};

static uint64_t random_state;

static uint64_t random_number(void)
{
	random_state ^= random_state << 13;
	random_state ^= random_state >> 7;
	random_state ^= random_state << 17;
	return random_state;
}

static unsigned tag_of(size_t page, uint32_t generation, size_t granule)
{
	unsigned kind = page % KINDS;
	if (kind == 3 && generation % 2)
		return 0;
	uint64_t mixed = (page * 0x9e3779b97f4a7c15u + generation * 0xc2b2ae3d27d4eb4fu) >> 32;
	return (mixed + granule * (1 + kind)) & 15;
}

static void retag(char *at, size_t page, uint32_t generation)
{
	for (size_t i = 0; i < PER_PAGE; i++) {
		char *granule = at + i * GRANULE;
		unsigned tag = tag_of(page, generation, i);
		set_tag(granule, tag);
		if (page % KINDS == 0)
			*(uint64_t *)((uintptr_t)granule | (uintptr_t)tag << 56) = generation + i;
	}
}

static void check(char *at, size_t page, uint32_t generation, struct counts *counts)
{
	size_t wrong = 0, data_wrong = 0;
	for (size_t i = 0; i < PER_PAGE; i++) {
		char *granule = at + i * GRANULE;
		unsigned tag = tag_of(page, generation, i);
		wrong += get_tag(granule) != tag;
		uint64_t data = page % KINDS ? 0 : generation + i;
		data_wrong += *(volatile uint64_t *)granule != data;
	}
	__atomic_fetch_add(&counts->wrong, wrong, __ATOMIC_RELAXED);
	__atomic_fetch_add(&counts->data_wrong, data_wrong, __ATOMIC_RELAXED);
	__atomic_fetch_add(&counts->pages, 1, __ATOMIC_RELAXED);
}

static void hammer(struct counts *counts, volatile int *ready, size_t pages, long number, long pause)
{
	char *memory = mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE | PROT_MEMORY_TAGS,
			    MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE | MAP_LOCKED, -1, 0);
	uint32_t *generation = calloc(pages, sizeof(*generation));
	if (memory == MAP_FAILED || !generation) {
		perror("TAGGER hammer");
		_exit(1);
	}
	random_state = 88172645463325252u + number;
	for (size_t page = 0; page < pages; page++)
		retag(memory + page * PAGE, page, generation[page]);
	__atomic_fetch_add(ready, 1, __ATOMIC_RELAXED);
	for (;;) {
		size_t page = random_number() % pages;
		char *at = memory + page * PAGE;
		check(at, page, generation[page], counts);
		if (page % KINDS != 2)
			retag(at, page, ++generation[page]);
		if (pause)
			pause_ms(pause);
	}
}

int main(void)
{
	set_up();
	while (!(getauxval(AT_HWCAP2) & HAS_MTE)) {
		puts("TAGGER no-mte");
		pause_ms(1000);
	}
	size_t pages = ((size_t)option("hammer.mib=", 8) << 20) / PAGE;
	long processes = option("hammer.processes=", 2), pause = option("hammer.pause=", 0);
	struct counts *counts = mmap(NULL, PAGE, PROT_READ | PROT_WRITE,
				     MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	volatile int *ready = (volatile int *)(counts + 1);
	for (long i = 0; i < processes; i++)
		if (fork() == 0)
			hammer(counts, ready, pages, i, pause);
	while (*ready < processes)
		pause_ms(10);
	puts("TAGGER ready");
	for (unsigned long round = 1;; round++) {
		pause_ms(250);
		printf("TAGGER check=%lu granules=%zu wrong=%zu data_wrong=%zu\n", round,
		       __atomic_load_n(&counts->pages, __ATOMIC_RELAXED) * PER_PAGE,
		       __atomic_load_n(&counts->wrong, __ATOMIC_RELAXED),
		       __atomic_load_n(&counts->data_wrong, __ATOMIC_RELAXED));
	}
}
