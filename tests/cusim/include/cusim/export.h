// Describes kernels to launchers. The builder appends to every module:
//     extern "C" const cusim_kernel cusim_kernels[] = {cusim_export<&name>::describe("name"), ..., {}};
#pragma once

#include "runtime.h"

template <class T> constexpr cusim_param cusim_param_of() {
    return {sizeof(T), std::is_pointer<T>::value          ? 'p'
                       : std::is_floating_point<T>::value ? 'f'
                       : std::is_integral<T>::value       ? 'i'
                                                          : 's'};
}

template <auto Kernel> struct cusim_export;
template <class... Args, void (*Kernel)(Args...)> struct cusim_export<Kernel> {
    static constexpr cusim_param params[] = {cusim_param_of<Args>()..., {}};

    template <size_t... I> static void unpack(void **p, std::index_sequence<I...>) {
        Kernel(*(std::remove_reference_t<Args> *)p[I]...);
    }
    static void entry(void **p) { unpack(p, std::index_sequence_for<Args...>{}); }

    static constexpr cusim_kernel describe(const char *name) { return {name, entry, sizeof...(Args), params}; }
};
