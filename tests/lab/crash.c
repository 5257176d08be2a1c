/* The init of a machine of its own: a child crashes on a tag, and its core goes to the console.
   Mappings with PROT_MTE: one of two pages with tags, and one that is not dumped. */
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/reboot.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <termios.h>
#include <unistd.h>

#define PROT_MTE 0x20
#define TAGGED ((char *)0x500000000000)
#define UNDUMPED ((char *)0x500000010000)

static void tag(char *at, size_t size)
{
	for (size_t n = 0; n < size / 16; n++) {
		char *pointer = (char *)((uintptr_t)(at + 16 * n) | (n * 3 & 15) << 56);
		__asm__ volatile(".arch_extension memtag\nstg %0, [%0]" : : "r"(pointer) : "memory");
	}
}

static void crash(void)
{
	int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED;

	/* Tagged addresses, faults at once. */
	prctl(PR_SET_TAGGED_ADDR_CTRL, 1 | 1 << 1 | 0xffff << 3, 0, 0, 0);
	mmap(TAGGED, 8192, PROT_READ | PROT_WRITE | PROT_MTE, flags, -1, 0);
	mmap(UNDUMPED, 4096, PROT_READ | PROT_WRITE | PROT_MTE, flags, -1, 0);
	madvise(UNDUMPED, 4096, MADV_DONTDUMP);
	tag(TAGGED, 8192);
	tag(UNDUMPED, 4096);
	*(volatile char *)(TAGGED + 16) = 1; /* the pointer has the tag 0, the memory 3 */
	_exit(1);
}

int main(void)
{
	struct rlimit unlimited = {RLIM_INFINITY, RLIM_INFINITY};
	struct termios raw;
	int out, in, pattern;
	static unsigned char data[1 << 16];
	static char hex[2 << 16];
	ssize_t n;

	mount("proc", "/proc", "proc", 0, NULL);
	mount("dev", "/dev", "devtmpfs", 0, NULL);
	pattern = open("/proc/sys/kernel/core_pattern", O_WRONLY);
	if (write(pattern, "/core", 5) != 5)
		return 1;
	setrlimit(RLIMIT_CORE, &unlimited);
	pid_t child = fork();
	if (!child)
		crash();
	waitpid(child, NULL, 0);
	out = open("/dev/ttyAMA0", O_RDWR);
	tcgetattr(out, &raw);
	cfmakeraw(&raw);
	tcsetattr(out, TCSANOW, &raw);
	in = open("/core", O_RDONLY);
	write(out, "\nBEGIN\n", 7);
	while ((n = read(in, data, sizeof(data))) > 0) {
		for (ssize_t i = 0; i < n; i++)
			sprintf(hex + 2 * i, "%02x", data[i]);
		for (ssize_t done = 0; done < 2 * n;)
			done += write(out, hex + done, 2 * n - done);
	}
	write(out, "\nEND\n", 5);
	tcdrain(out);
	reboot(RB_POWER_OFF);
	return 0;
}
