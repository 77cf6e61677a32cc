// Modules and launches. The image of a module is the text "CUSIM:" and the path of a library made by build.py. It brings
// its own kernel runtime, so modules of any build mode can be loaded.
#include "driver.h"

#include <cstring>
#include <dlfcn.h>

namespace {

struct Module;

struct Function {
    Module *module;
    const cusim_kernel *kernel;
    int max_dynamic_bytes = 48 << 10;
};

struct Module {
    void *library;
    const cusim_kernel *kernels;
    void *(*static_shared)();
    decltype(&cusim_launch) launch;
    decltype(&cusim_configure) configure;
    std::map<std::string, Function> functions;

    ~Module() { dlclose(library); }
};

auto &modules = *new Registry<Module>;
auto &functions = *new std::map<void *, std::shared_ptr<Module>>; // a function's module; under functions_mutex
auto &functions_mutex = *new std::mutex;

std::shared_ptr<Module> module_of(void *function) {
    std::lock_guard<std::mutex> lock(functions_mutex);
    auto found = functions.find(function);
    return found == functions.end() ? nullptr : found->second;
}

void configure(Module &module) { module.configure(settings.order, settings.seed, settings.wait_limit_s); }

// The arguments of a launch, copied when it is submitted.
struct Arguments {
    std::vector<std::vector<char>> values;

    Arguments(const cusim_kernel &kernel, void **params) {
        for (size_t i = 0; i < kernel.n_params; i++)
            values.emplace_back((char *)params[i], (char *)params[i] + kernel.params[i].size);
    }
    std::vector<void *> pointers() const {
        std::vector<void *> result;
        for (auto &value : values)
            result.push_back((void *)value.data());
        return result;
    }
};

void run_kernel(Module &module, const cusim_kernel &kernel, const Arguments &arguments, const unsigned *grid,
                const unsigned *block, size_t dynamic_bytes) {
    count("kernel");
    if (CUresult error = planned_failure("kernel"))
        return fail_device(error, "kernel %s failed as planned", kernel.name);
    char message[2048];
    std::vector<void *> params = arguments.pointers();
    if (module.launch(&kernel, params.data(), grid, block, dynamic_bytes, module.static_shared(), message, sizeof message))
        fail_device(CUDA_ERROR_LAUNCH_FAILED, "kernel %s: %s", kernel.name, message);
    check_guards(kernel.name);
}

} // namespace

void configure_runtimes() {
    for (auto &module : modules.all())
        configure(*module);
}

void release_all_modules() {
    std::lock_guard<std::mutex> lock(functions_mutex);
    functions.clear();
    modules.clear();
}

// --- modules ---

DRIVER_API CUresult cuModuleLoadData(void **module, const void *image) {
    ENTER_CONTEXT(cuModuleLoadData);
    const char prefix[] = "CUSIM:", elf[] = "\x7f"
                                            "ELF";
    if (!memcmp(image, elf, sizeof elf - 1))
        return CUDA_ERROR_NO_BINARY_FOR_GPU; // a real cubin
    if (strncmp((const char *)image, prefix, sizeof prefix - 1))
        return CUDA_ERROR_INVALID_IMAGE;
    void *library = dlopen((const char *)image + sizeof prefix - 1, RTLD_NOW | RTLD_LOCAL);
    if (!library)
        return CUDA_ERROR_INVALID_IMAGE;
    auto loaded = std::make_shared<Module>();
    loaded->library = library;
    loaded->kernels = (const cusim_kernel *)dlsym(library, "cusim_kernels");
    loaded->static_shared = (void *(*)())dlsym(library, "cusim_static_shared");
    loaded->launch = (decltype(&cusim_launch))dlsym(library, "cusim_launch"); // these two come from the runtime
    loaded->configure = (decltype(&cusim_configure))dlsym(library, "cusim_configure");
    if (!loaded->kernels || !loaded->static_shared || !loaded->launch || !loaded->configure)
        return CUDA_ERROR_INVALID_IMAGE;
    configure(*loaded);
    *module = modules.add(loaded);
    return CUDA_SUCCESS;
}

DRIVER_API CUresult cuModuleLoadDataEx(void **module, const void *image, unsigned, void *, void **) {
    return cuModuleLoadData(module, image);
}

DRIVER_API CUresult cuModuleUnload(void *handle) {
    ENTER_CONTEXT(cuModuleUnload);
    std::shared_ptr<Module> module = modules.remove(handle);
    if (!module)
        return CUDA_ERROR_INVALID_HANDLE;
    std::lock_guard<std::mutex> lock(functions_mutex);
    for (auto &entry : module->functions)
        functions.erase(&entry.second);
    return CUDA_SUCCESS;
}

DRIVER_API CUresult cuModuleGetFunction(void **function, void *handle, const char *name) {
    ENTER_CONTEXT(cuModuleGetFunction);
    std::shared_ptr<Module> module = modules.find(handle);
    if (!module)
        return CUDA_ERROR_INVALID_HANDLE;
    for (const cusim_kernel *kernel = module->kernels; kernel->name; kernel++)
        if (!strcmp(kernel->name, name)) {
            std::lock_guard<std::mutex> lock(functions_mutex);
            Function &entry = module->functions[name];
            entry.module = module.get();
            entry.kernel = kernel;
            functions[&entry] = module;
            *function = &entry;
            return CUDA_SUCCESS;
        }
    return CUDA_ERROR_NOT_FOUND;
}

// --- functions ---

enum { MAX_THREADS_PER_BLOCK = 0, NUM_REGS = 4, MAX_DYNAMIC_SHARED = 8 }; // CUfunction_attribute

DRIVER_API CUresult cuFuncSetAttribute(void *function, int attribute, int value) {
    ENTER_CONTEXT(cuFuncSetAttribute);
    if (!module_of(function))
        return CUDA_ERROR_INVALID_HANDLE;
    if (attribute == MAX_DYNAMIC_SHARED) {
        if (value < 0 || value > 99 << 10) // MAX_SHARED_MEMORY_PER_BLOCK_OPTIN in control.cpp
            return CUDA_ERROR_INVALID_VALUE;
        ((Function *)function)->max_dynamic_bytes = value;
    }
    return CUDA_SUCCESS;
}

DRIVER_API CUresult cuFuncGetAttribute(int *value, int attribute, void *function) {
    ENTER_CONTEXT(cuFuncGetAttribute);
    if (!module_of(function))
        return CUDA_ERROR_INVALID_HANDLE;
    *value = attribute == MAX_THREADS_PER_BLOCK ? 1024
             : attribute == NUM_REGS            ? 32
             : attribute == MAX_DYNAMIC_SHARED  ? ((Function *)function)->max_dynamic_bytes
                                                : 0;
    return CUDA_SUCCESS;
}

DRIVER_API CUresult cuFuncLoad(void *function) {
    ENTER_CONTEXT(cuFuncLoad);
    return module_of(function) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_HANDLE;
}

DRIVER_API CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int *n, void *function, int, size_t) {
    ENTER_CONTEXT(cuOccupancyMaxActiveBlocksPerMultiprocessor);
    *n = 2;
    return module_of(function) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_HANDLE;
}

DRIVER_API CUresult cuLaunchKernel(void *function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                                   unsigned block_y, unsigned block_z, unsigned dynamic_bytes, void *stream_handle,
                                   void **params, void **) {
    ENTER_CONTEXT(cuLaunchKernel);
    std::shared_ptr<Module> module = module_of(function);
    std::shared_ptr<Stream> stream = find_stream(stream_handle);
    if (!module || !stream)
        return CUDA_ERROR_INVALID_HANDLE;
    const cusim_kernel &kernel = *((Function *)function)->kernel;
    uint64_t n_threads = (uint64_t)block_x * block_y * block_z;
    if (!grid_x || !grid_y || !grid_z || grid_y > 65535 || grid_z > 65535 || !n_threads || n_threads > 1024 ||
        (int64_t)dynamic_bytes > ((Function *)function)->max_dynamic_bytes || (kernel.n_params && !params))
        return CUDA_ERROR_INVALID_VALUE;
    Arguments arguments(kernel, params);
    return stream->submit({NodeKind::Kernel, [=, &kernel] {
                               const unsigned grid[3] = {grid_x, grid_y, grid_z}, block[3] = {block_x, block_y, block_z};
                               run_kernel(*module, kernel, arguments, grid, block, dynamic_bytes);
                           }});
}

struct LaunchConfig {
    unsigned grid[3], block[3], dynamic_bytes;
    void *stream;
    void *attributes; // they let kernels overlap, which here none do
    unsigned n_attributes;
};

DRIVER_API CUresult cuLaunchKernelEx(const LaunchConfig *config, void *function, void **params, void **extra) {
    return cuLaunchKernel(function, config->grid[0], config->grid[1], config->grid[2], config->block[0], config->block[1],
                          config->block[2], config->dynamic_bytes, config->stream, params, extra);
}

// --- what cuda.bindings asks first ---

// Finds a function by its name without version suffix; there is one version of each here.
DRIVER_API CUresult cuGetProcAddress_v2(const char *name, void **function, int, uint64_t, int *status) {
    static void *self = [] {
        Dl_info info;
        dladdr((void *)&cuModuleUnload, &info);
        return dlopen(info.dli_fname, RTLD_NOW | RTLD_NOLOAD);
    }();
    *function = nullptr;
    for (const char *suffix : {"_v2", "", "WithFlags"})
        if (!*function)
            *function = dlsym(self, (name + std::string(suffix)).c_str());
    if (status)
        *status = *function ? 0 : 1; // SUCCESS, SYMBOL_NOT_FOUND
    return *function ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}

DRIVER_API CUresult cuGetProcAddress(const char *name, void **function, int version, uint64_t flags) {
    return cuGetProcAddress_v2(name, function, version, flags, nullptr);
}

// NVRTC asks for tables of the driver's that nobody else knows, and crashes if there is not even this function.
DRIVER_API CUresult cuGetExportTable(const void **table, const void *) {
    *table = nullptr;
    return CUDA_ERROR_NOT_FOUND;
}
