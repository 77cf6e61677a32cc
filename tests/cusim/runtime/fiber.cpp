#include "fiber.h"

#include <cstdint>
#include <cstdlib>
#include <pthread.h>
#include <sys/mman.h>

#ifdef CUSIM_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
static const size_t STACK_BYTES = 256 << 10; // red zones take room
#else
static const size_t STACK_BYTES = 64 << 10;
#endif
static const size_t GUARD_BYTES = 4096;
static const size_t COLOR_BYTES = 320, STACK_COLORS = 12;

#ifndef __x86_64__
#error "cusim_switch saves the registers of x86-64; other machines need their own"
#endif

// Saves the six callee-saved registers and the stack pointer, loads those of the other flow, returns into it.
extern "C" void cusim_switch(void **save_stack_pointer, void *load_stack_pointer);
__asm__(R"(
.text
.p2align 4
.globl cusim_switch
.hidden cusim_switch
.type cusim_switch,@function
cusim_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size cusim_switch,.-cusim_switch
)");

void context_allocate(Context *context) {
    void *p = mmap(nullptr, STACK_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED || mprotect(p, GUARD_BYTES, PROT_NONE))
        abort(); // no memory for 1024 small stacks
    context->stack = (char *)p + GUARD_BYTES;
    // Stacks that all began at the start of a page would share a few lines of the CPU's first-level cache.
    static unsigned n_allocated = 0;
    context->stack_bytes = STACK_BYTES - GUARD_BYTES - n_allocated++ % STACK_COLORS * COLOR_BYTES;
}

void context_prepare(Context *context, void (*entry)()) {
    void **top = (void **)((uintptr_t)(context->stack + context->stack_bytes) & ~(uintptr_t)15);
    *--top = nullptr; // the return address that `entry` never uses; keeps its frame aligned as after a call
    *--top = (void *)entry;
    for (int i = 0; i < 6; i++)
        *--top = nullptr;
    context->stack_pointer = top;
    context->sanitizer_stack = nullptr;
#ifdef CUSIM_ASAN
    __asan_unpoison_memory_region(context->stack, context->stack_bytes);
#endif
}

void context_switch(Context *from, Context *to, bool leaving) {
#ifdef CUSIM_ASAN
    __sanitizer_start_switch_fiber(leaving ? nullptr : &from->sanitizer_stack, to->stack, to->stack_bytes);
#else
    (void)leaving;
#endif
    cusim_switch(&from->stack_pointer, to->stack_pointer);
#ifdef CUSIM_ASAN
    __sanitizer_finish_switch_fiber(from->sanitizer_stack, nullptr, nullptr);
#endif
}

void context_entered() {
#ifdef CUSIM_ASAN
    __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
}

void context_adopt_thread(Context *context) {
#ifdef CUSIM_ASAN // needs to know the bounds of every stack
    pthread_attr_t attributes;
    void *stack;
    if (pthread_getattr_np(pthread_self(), &attributes) ||
        pthread_attr_getstack(&attributes, &stack, &context->stack_bytes))
        abort();
    pthread_attr_destroy(&attributes);
    context->stack = (char *)stack;
#endif
    context->sanitizer_stack = nullptr;
}
