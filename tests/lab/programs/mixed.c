/*
 * A guest with a 64-bit kernel and a 32-bit process: what memory tags do to AArch32 code at EL0.
 *
 * Process 1 tags memory in the tagger's pattern, shares it with /aarch32 and lets that process
 * map, load and store. It prints what it finds on the serial console:
 *
 *   MIXED NAME VALUE                     once each; see main()
 *   TAGGER ipa INDEX 0xADDRESS           the guest physical address of each shared page
 *   TAGGER check=N granules=G wrong=W data_wrong=D     for ever, while /aarch32 stores into them
 */
#include "guest.h"
#include <errno.h>
#include <elf.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/uio.h>
#include <sys/wait.h>

enum { PAGES = 2, SIZE = PAGES * PAGE, GRANULES = SIZE / GRANULE };
enum { PEEK_TAGS = 33, POKE_TAGS = 34, SET_TAGGED_ADDR_CTRL = 55, GET_TAGGED_ADDR_CTRL = 56 };
enum { TAGGED_ADDR_ENABLE = 1, TCF_SYNC = 2 };
/* Numbers of 32-bit system calls, and the other operations of /aarch32. */
enum { LOAD = -1, STORE = -2, SPIN = -3, WRITE = 4, GETPID = 20, MPROTECT = 125, PRCTL = 172,
       MMAP2 = 192 };
enum { BEFORE = 0x5eed, STORED = 0x32b17, SPUN = 0x51319 };

static int requests, answers;
static pid_t child;

static void say(const char *name, long value)
{
	printf("MIXED %s %ld\n", name, value);
}

static void need(int good, const char *what)
{
	if (good)
		return;
	perror(what);
	for (;;)
		pause_ms(1000);
}

static void tell(int what, uint32_t a, uint32_t b, uint32_t c, uint32_t d, uint32_t e, uint32_t f)
{
	uint32_t words[8] = { what, a, b, c, d, e, f };
	need(write(requests, words, sizeof(words)) == sizeof(words), "a request");
}

static int32_t ask(int what, uint32_t a, uint32_t b, uint32_t c, uint32_t d, uint32_t e, uint32_t f)
{
	int32_t answer;
	tell(what, a, b, c, d, e, f);
	need(read(answers, &answer, sizeof(answer)) == sizeof(answer), "an answer");
	return answer;
}

/* An address can be above 2 GiB; an error is one of the last few numbers. */
static uint32_t ask_for_memory(uint32_t protection, uint32_t flags, uint32_t fd)
{
	uint32_t size = fd == (uint32_t)-1 ? PAGE : SIZE;
	return ask(MMAP2, 0, size, PROT_READ | PROT_WRITE | protection, flags, fd, 0);
}

static long worked(uint32_t address)
{
	return address < -4095U ? 0 : (int32_t)address;
}

static void start_aarch32(void)
{
	int in[2], out[2];
	need(pipe(in) == 0 && pipe(out) == 0, "pipe");
	child = fork();
	if (child == 0) {
		dup2(in[0], 0);
		dup2(out[1], 1);
		execl("/aarch32", "/aarch32", NULL);
		_exit(errno);
	}
	close(in[0]);
	close(out[1]);
	requests = in[1];
	answers = out[0];
}

static FILE *open_of_child(const char *what)
{
	char path[64];
	snprintf(path, sizeof(path), "/proc/%d/%s", child, what);
	FILE *file = fopen(path, "r");
	need(file != NULL, path);
	return file;
}

/* Read from its auxiliary vector, which has words of 32 bits. */
static uint32_t aux_of_child(uint32_t type)
{
	uint32_t pair[2], found = 0;
	FILE *file = open_of_child("auxv");
	while (fread(pair, sizeof(pair), 1, file) == 1)
		if (pair[0] == type)
			found = pair[1];
	fclose(file);
	return found;
}

/* Whether its mapping at the address has the flag "mt": that of PROT_MTE. */
static int is_tagged_in_child(uint32_t address)
{
	char line[512];
	unsigned long start, end;
	int inside = 0, found = 0;
	FILE *file = open_of_child("smaps");
	while (fgets(line, sizeof(line), file)) {
		if (sscanf(line, "%lx-%lx ", &start, &end) == 2)
			inside = start <= address && address < end;
		else if (inside && !strncmp(line, "VmFlags:", 8))
			found = strstr(line, " mt") != NULL;
	}
	fclose(file);
	return found;
}

static uint64_t ipa_in_child(uint32_t address)
{
	uint64_t entry = 0;
	FILE *file = open_of_child("pagemap");
	fseek(file, address / PAGE * sizeof(entry), SEEK_SET);
	need(fread(&entry, sizeof(entry), 1, file) == 1, "pagemap");
	fclose(file);
	return (entry & ((1UL << 55) - 1)) * PAGE;
}

static void on_fault(int number, siginfo_t *info, void *context)
{
	(void)number, (void)context;
	_exit(info->si_code);
}

/* Make the same access in a 64-bit process with checks on; return its fault's code, or 0. */
static int fault_of_checked_access(char *address)
{
	int status;
	pid_t checked = fork();
	if (checked == 0) {
		struct sigaction action = { .sa_sigaction = on_fault, .sa_flags = SA_SIGINFO };
		sigaction(SIGSEGV, &action, NULL);
		need(prctl(SET_TAGGED_ADDR_CTRL, TAGGED_ADDR_ENABLE | TCF_SYNC, 0, 0, 0) == 0, "prctl");
		*(volatile uint32_t *)address;
		_exit(0);
	}
	need(waitpid(checked, &status, 0) == checked && WIFEXITED(status), "the checked access");
	return WEXITSTATUS(status);
}

/* Set tags in the 32-bit process's own memory, which it cannot do itself. */
static long tag_page_of_child(uint32_t address)
{
	unsigned char tags[PER_PAGE], back[PER_PAGE];
	struct iovec set = { tags, sizeof(tags) }, got = { back, sizeof(back) };
	for (size_t i = 0; i < PER_PAGE; i++)
		tags[i] = (i * 3 + 1) & 15;
	need(ptrace(PTRACE_ATTACH, child, 0, 0) == 0, "PTRACE_ATTACH");
	need(waitpid(child, NULL, 0) == child, "waitpid");
	long result = ptrace((enum __ptrace_request)POKE_TAGS, child, (long)address, &set);
	if (result == 0)
		result = ptrace((enum __ptrace_request)PEEK_TAGS, child, (long)address, &got);
	need(ptrace(PTRACE_DETACH, child, 0, 0) == 0, "PTRACE_DETACH");
	if (result != 0)
		return -errno;
	return memcmp(tags, back, sizeof(tags)) ? 0 : (long)got.iov_len;
}

static void look_at_own_memory(void)
{
	uint32_t own = ask_for_memory(PROT_MEMORY_TAGS, MAP_PRIVATE | MAP_ANONYMOUS, -1);
	say("own-prot-mte", worked(own));
	say("own-tagged", is_tagged_in_child(own));
	uint32_t later = ask_for_memory(0, MAP_PRIVATE | MAP_ANONYMOUS, -1);
	uint32_t protection = PROT_READ | PROT_WRITE | PROT_MEMORY_TAGS;
	say("own-mprotect", ask(MPROTECT, later, PAGE, protection, 0, 0, 0));
	uint32_t control = TAGGED_ADDR_ENABLE | TCF_SYNC;
	say("set-checks", ask(PRCTL, SET_TAGGED_ADDR_CTRL, control, 0, 0, 0, 0));
	say("get-checks", ask(PRCTL, GET_TAGGED_ADDR_CTRL, 0, 0, 0, 0, 0));
	ask(STORE, own, STORED, 0, 0, 0, 0);
	say("own-poked", tag_page_of_child(own));
	say("own-load", ask(LOAD, own, 0, 0, 0, 0, 0) == STORED);
	ask(STORE, own + 4, SPUN, 0, 0, 0, 0);
	say("own-store", ask(LOAD, own + 4, 0, 0, 0, 0, 0) == SPUN);
	say("own-ipa", ipa_in_child(own));
}

static size_t count_other(char *memory, uint32_t value)
{
	size_t other = 0;
	for (size_t i = 0; i < GRANULES; i++)
		other += *(volatile uint32_t *)(memory + i * GRANULE) != value;
	return other;
}

/* Load and store all shared memory through one mapping of the 32-bit process. */
static void look_at_shared_memory(const char *name, char *memory, uint32_t there)
{
	char line[32];
	size_t wrong = 0;
	for (size_t i = 0; i < GRANULES; i++) {
		*(uint32_t *)(memory + i * GRANULE) = BEFORE;
		wrong += ask(LOAD, there + i * GRANULE, 0, 0, 0, 0, 0) != BEFORE;
		ask(STORE, there + i * GRANULE, STORED, 0, 0, 0, 0);
	}
	snprintf(line, sizeof(line), "%s-loads-wrong", name);
	say(line, wrong);
	snprintf(line, sizeof(line), "%s-stores-wrong", name);
	say(line, count_other(memory, STORED));
	snprintf(line, sizeof(line), "%s-tags-wrong", name);
	say(line, count_wrong(memory, GRANULES));
}

int main(void)
{
	set_up();
	say("hwcap2-64-mte", (getauxval(AT_HWCAP2) & HAS_MTE) != 0);
	int fd = memfd_create("shared", 0);
	need(ftruncate(fd, SIZE) == 0, "memfd");
	char *memory = mmap(NULL, SIZE, PROT_READ | PROT_WRITE | PROT_MEMORY_TAGS, MAP_SHARED, fd, 0);
	need(memory != MAP_FAILED && mlock(memory, SIZE) == 0, "mmap");
	tag_all(memory, GRANULES);
	print_ipas(memory, PAGES);

	start_aarch32();
	say("runs", ask(GETPID, 0, 0, 0, 0, 0, 0) == child);
	say("hwcap-32", aux_of_child(AT_HWCAP));
	say("hwcap2-32", aux_of_child(AT_HWCAP2));
	look_at_own_memory();

	uint32_t plain = ask_for_memory(0, MAP_SHARED, fd);
	uint32_t tagged = ask_for_memory(PROT_MEMORY_TAGS, MAP_SHARED, fd);
	say("shared-prot-mte", worked(tagged));
	look_at_shared_memory("plain", memory, plain);
	look_at_shared_memory("tagged", memory, tagged);
	/* The second granule has the tag 5: here the kernel reads it for a system call. */
	int32_t written = ask(WRITE, 1, tagged + GRANULE, sizeof(written), 0, 0, 0), answer = 0;
	need(read(answers, &answer, sizeof(answer)) == sizeof(answer), "an answer");
	say("system-call", written == STORED && answer == sizeof(written));
	say("checked-64-bit-fault", fault_of_checked_access(memory + GRANULE));

	tell(SPIN, tagged, SPUN, tagged + SIZE, 0, 0, 0);
	while (count_other(memory, SPUN))
		pause_ms(10);
	puts("TAGGER ready");
	for (unsigned long check = 1;; check++) {
		*(uint32_t *)(memory + check % GRANULES * GRANULE) = BEFORE;
		pause_ms(250);
		printf("TAGGER check=%lu granules=%d wrong=%zu data_wrong=%zu\n", check, GRANULES,
		       count_wrong(memory, GRANULES), count_other(memory, SPUN));
	}
}
