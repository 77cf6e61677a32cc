#include "bus_error.h"

#include <fcntl.h>
#include <signal.h>
#include <stdint.h>
#include <string.h>
#include <unistd.h>

// The pages behind the new end of a file that was cut short are still mapped, but whoever reads them gets SIGBUS: in
// the middle of a product, on any thread. So all that is left is to say what happened, with calls that a signal handler
// may make.

enum { LONGEST_LINE = 4096 + 128 }; // of /proc/self/maps: a path, and what is before it

static int code;

static void say(const char *text, size_t n_bytes) {
    while (n_bytes > 0) {
        const ssize_t n = write(STDERR_FILENO, text, n_bytes);
        if (n <= 0)
            return;
        text += n, n_bytes -= (size_t)n;
    }
}

static const char *parse_hexadecimal(const char *at, uintptr_t *value) {
    *value = 0;
    for (;; at++) {
        const int digit = *at >= '0' && *at <= '9' ? *at - '0' : *at >= 'a' && *at <= 'f' ? *at - 'a' + 10 : -1;
        if (digit < 0)
            return at;
        *value = *value << 4 | (uintptr_t)digit;
    }
}

// The path in a line of /proc/self/maps, "begin-end flags offset device inode path", if it is a file's that holds an
// address.
static const char *path_of(const char *line, uintptr_t address) {
    uintptr_t begin, end;
    const char *at = parse_hexadecimal(line, &begin);
    if (*at != '-')
        return NULL;
    parse_hexadecimal(at + 1, &end);
    return address >= begin && address < end ? strchr(line, '/') : NULL;
}

// Finds the path of the file that is mapped at an address: in `line`, NULL if there is none.
static const char *mapped_path(uintptr_t address, char line[LONGEST_LINE]) {
    const int maps = open("/proc/self/maps", O_RDONLY | O_CLOEXEC);
    if (maps < 0)
        return NULL;
    const char *path = NULL;
    size_t n = 0;
    char c;
    while (!path && read(maps, &c, 1) == 1) {
        if (c != '\n') {
            if (n < LONGEST_LINE - 1)
                line[n++] = c;
            continue;
        }
        line[n] = 0, n = 0;
        path = path_of(line, address);
    }
    close(maps);
    return path;
}

static void explain(int number, siginfo_t *info, void *context) {
    (void)context;
    static const char before[] = "\nerror: ",
                      after[] = ": cannot be read any more: it was cut short or replaced while it was in "
                                "use; get the file again, and leave it alone while it is used\n";
    static const char show_cursor[] = "\033[?25h"; // a progress bar may have hidden it
    char line[LONGEST_LINE];
    const char *path = mapped_path((uintptr_t)info->si_addr, line);
    if (!path) { // as if this were not here: it happens again at once
        signal(number, SIG_DFL);
        return;
    }
    if (isatty(STDERR_FILENO))
        say(show_cursor, sizeof show_cursor - 1);
    say(before, sizeof before - 1);
    say(path, strlen(path));
    say(after, sizeof after - 1);
    _exit(code);
}

int explain_bus_errors(int exit_code) {
    struct sigaction action;
    memset(&action, 0, sizeof action);
    action.sa_sigaction = explain;
    action.sa_flags = SA_SIGINFO;
    code = exit_code;
    return sigaction(SIGBUS, &action, NULL);
}
