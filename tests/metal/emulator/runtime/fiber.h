// Switching between the stacks of GPU threads. A switch is a call: registers that calls preserve are all there is.
#pragma once
#include <cstddef>
#include <cstdint>

#if defined(METAL_EMULATOR_PORTABLE) || !(defined(__x86_64__) || defined(__aarch64__))
#include <ucontext.h>

// Ten times slower than the others: every switch saves the signal mask by a system call.
struct Stack {
    ucontext_t context;
};
inline void switch_stack(Stack& from, Stack& to) { swapcontext(&from.context, &to.context); }
inline void prepare_stack(Stack& stack, unsigned char* lowest, size_t size, void (*entry)())
{
    getcontext(&stack.context);
    stack.context.uc_stack.ss_sp = lowest;
    stack.context.uc_stack.ss_size = size;
    stack.context.uc_link = nullptr;
    makecontext(&stack.context, entry, 0);
}
#else
struct Stack {
    void* pointer;
};
#if defined(__x86_64__)
// Words on a stack that waits: r15 to r12, rbx, rbp, where to go on, and one that aligns the stack.
constexpr size_t FRAME = 8, RETURN = 6;
__attribute__((naked, noinline)) inline void switch_pointers(void**, void*)
{
    asm volatile("pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
                 "movq %rsp, (%rdi)\n movq %rsi, %rsp\n"
                 "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret\n");
}
#else
// Words on a stack that waits: d8 to d15, x19 to x30; x30 is where to go on.
constexpr size_t FRAME = 20, RETURN = 19;
__attribute__((naked, noinline)) inline void switch_pointers(void**, void*)
{
    asm volatile("stp d8, d9, [sp, #-160]!\n stp d10, d11, [sp, #16]\n stp d12, d13, [sp, #32]\n"
                 "stp d14, d15, [sp, #48]\n stp x19, x20, [sp, #64]\n stp x21, x22, [sp, #80]\n"
                 "stp x23, x24, [sp, #96]\n stp x25, x26, [sp, #112]\n stp x27, x28, [sp, #128]\n"
                 "stp x29, x30, [sp, #144]\n mov x9, sp\n str x9, [x0]\n mov sp, x1\n"
                 "ldp d10, d11, [sp, #16]\n ldp d12, d13, [sp, #32]\n ldp d14, d15, [sp, #48]\n"
                 "ldp x19, x20, [sp, #64]\n ldp x21, x22, [sp, #80]\n ldp x23, x24, [sp, #96]\n"
                 "ldp x25, x26, [sp, #112]\n ldp x27, x28, [sp, #128]\n ldp x29, x30, [sp, #144]\n"
                 "ldp d8, d9, [sp], #160\n ret\n");
}
#endif
inline void switch_stack(Stack& from, Stack& to) { switch_pointers(&from.pointer, to.pointer); }
inline void prepare_stack(Stack& stack, unsigned char* lowest, size_t size, void (*entry)())
{
    void** frame = reinterpret_cast<void**>(lowest + size) - FRAME;
    for (size_t i = 0; i < FRAME; i++) frame[i] = nullptr;
    frame[RETURN] = reinterpret_cast<void*>(entry);
    stack.pointer = frame;
}
#endif
