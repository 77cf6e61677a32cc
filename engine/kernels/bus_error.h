// What becomes of a process that reads a mapped file which somebody cuts short.
#ifndef ENGINE_BUS_ERROR_H
#define ENGINE_BUS_ERROR_H

// From now on such a process says which file it was, and ends with this code; other bus errors end it as ever. Returns
// 0, or -1 with errno set.
int explain_bus_errors(int exit_code);

#endif
