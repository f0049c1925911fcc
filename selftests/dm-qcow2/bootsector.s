# SPDX-License-Identifier: GPL-2.0-or-later
#
# A guest that is a boot sector: it reads sector 1, writes that with words of its own behind
# its first 8 bytes to sector 2, says so on the first serial line, and switches its machine off.
#
#	as --32 -o guest.o bootsector.s
#	ld -m elf_i386 --oformat binary -Ttext 0x7c00 -o guest guest.o

	.code16
	.globl _start
_start:	xor %ax, %ax
	mov %ax, %ds
	mov %ax, %es
	mov %ax, %ss
	mov $0x7c00, %sp
	mov %dl, disk
	movb $1, lba
	mov $0x42, %ah
	call ask
	jc bad
	# Its own words behind what it has read, all of that to the next sector
	mov $0x8008, %di
	mov $mark, %si
	mov $8, %cx
	rep movsb
	movb $2, lba
	mov $0x4300, %ax
	call ask
	jc bad
	mov $good, %si
	call say
	# ACPI's "soft off"
off:	mov $0x604, %dx
	mov $0x2000, %ax
	out %ax, %dx
1:	hlt
	jmp 1b
bad:	mov $failed, %si
	call say
	jmp off

ask:	mov $packet, %si
	mov disk, %dl
	int $0x13
	ret

	# To the first serial line
say:	mov $0x3f8, %dx
1:	lodsb
	test %al, %al
	jz 2f
	out %al, %dx
	jmp 1b
2:	ret

disk:	.byte 0
	.balign 4
packet:	.byte 16, 0
	.word 1, 0x8000, 0
lba:	.quad 1
good:	.asciz "guest: done\n"
failed:	.asciz "guest: error\n"
mark:	.ascii "by guest"
	.org 510
	.word 0xaa55
