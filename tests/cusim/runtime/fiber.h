// Fibers: stacks and switches between them. x86-64, System V calling convention.
#pragma once

#include <stddef.h>

// One suspended flow of control.
struct Context {
    void *stack_pointer = nullptr;
    char *stack = nullptr;
    size_t stack_bytes = 0;
    void *sanitizer_stack = nullptr; // ASan's fake stack while suspended
};

// Gives `context` a stack of its own. It lives as long as the process.
void context_allocate(Context *context);

// Makes the next switch to `context` call `entry`, which must never return. Whatever was on the stack is forgotten.
void context_prepare(Context *context, void (*entry)());

// Suspends `from` (the flow that calls) and resumes `to`; returns when somebody switches to `from`. `leaving`: `from`
// will not be resumed before it is prepared again.
void context_switch(Context *from, Context *to, bool leaving);

// The first thing `entry` calls.
void context_entered();

// Makes `context` stand for the calling OS thread, on its own stack.
void context_adopt_thread(Context *context);
