@ A 32-bit process that does what it is told, one request at a time, for the guest `mixed`.
@
@ A request on standard input is eight words: an operation and up to six arguments; the answer on
@ standard output is one word. The operation is the number of a system call (the answer is its
@ result, or -errno), LOAD (a word from the first argument's address), STORE (the second argument
@ to that address) or SPIN, which stores the second argument for ever to every granule from the
@ first to the third and does not answer.

	.arch	armv8-a
	.equ	LOAD, -1
	.equ	STORE, -2
	.equ	SPIN, -3
	.equ	EXIT, 1
	.equ	READ, 3
	.equ	WRITE, 4
	.equ	REQUEST, 32

	.text
	.global	_start
_start:
	ldr	r8, =words
next:
	mov	r7, #READ
	mov	r0, #0
	mov	r1, r8
	mov	r2, #REQUEST
	svc	#0
	cmp	r0, #REQUEST
	bne	end

	ldr	r7, [r8]
	add	r9, r8, #4
	ldm	r9, {r0-r5}
	cmp	r7, #LOAD
	beq	load
	cmp	r7, #STORE
	beq	store
	cmp	r7, #SPIN
	beq	spin
	svc	#0
	b	answer
load:
	ldr	r0, [r0]
	b	answer
store:
	str	r1, [r0]
	mov	r0, #0
answer:
	str	r0, [r8]
	mov	r7, #WRITE
	mov	r0, #1
	mov	r1, r8
	mov	r2, #4
	svc	#0
	b	next

spin:
	mov	r3, r0
1:	str	r1, [r3], #16
	cmp	r3, r2
	blo	1b
	b	spin

end:
	mov	r7, #EXIT
	mov	r0, #0
	svc	#0

	.bss
	.balign	4
words:
	.skip	REQUEST
