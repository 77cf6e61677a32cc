// Describes kernels to launchers. The builder appends to every module:
//     extern "C" const cusim_kernel cusim_kernels[] = {cusim_export<&name>::describe("name"), ..., {}};
#pragma once

#include "runtime.h"

// Without the standard library's headers for types: to read them takes longer than to compile a small kernel.
template <class T> constexpr char cusim_kind_of = 's';
template <class T> constexpr char cusim_kind_of<T *> = 'p';
#define CUSIM_KIND(T, kind) template <> inline constexpr char cusim_kind_of<T> = kind;
CUSIM_KIND(float, 'f')
CUSIM_KIND(double, 'f')
CUSIM_KIND(bool, 'i')
CUSIM_KIND(char, 'i')
CUSIM_KIND(signed char, 'i')
CUSIM_KIND(unsigned char, 'i')
CUSIM_KIND(short, 'i')
CUSIM_KIND(unsigned short, 'i')
CUSIM_KIND(int, 'i')
CUSIM_KIND(unsigned, 'i')
CUSIM_KIND(long, 'i')
CUSIM_KIND(unsigned long, 'i')
CUSIM_KIND(long long, 'i')
CUSIM_KIND(unsigned long long, 'i')

template <size_t... I> struct cusim_indices {};

template <auto Kernel> struct cusim_export;
template <class... Args, void (*Kernel)(Args...)> struct cusim_export<Kernel> {
    static constexpr cusim_param params[] = {{sizeof(Args), cusim_kind_of<Args>}..., {}};

    template <size_t... I> static void unpack(void **p, cusim_indices<I...>) {
        Kernel(*(Args *)p[I]...);
    }
    static void entry(void **p) { unpack(p, cusim_indices<__integer_pack(sizeof...(Args))...>{}); }

    static constexpr cusim_kernel describe(const char *name) { return {name, entry, sizeof...(Args), params}; }
};
