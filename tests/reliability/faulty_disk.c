// A file system that is slow, full, or kills the process in the middle of an operation: for LD_PRELOAD.
//
// It counts what a process does to files below $FAULTY_DISK: writes, syncs, renames, removals, new directories.
//   FAULTY_DISK_KILL_AT=n   SIGKILL in the n-th operation: half of a write is done, a rename not at all
//   FAULTY_DISK_ROOM=n      ENOSPC beyond n bytes in all: the write that crosses them is short, as on a real disk
//   FAULTY_DISK_SLOW=n      n microseconds before each operation
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

static long operations, written;

long faulty_disk_operations(void) { return operations; }
long faulty_disk_written(void) { return written; }

static long number(const char *name) {
  const char *value = getenv(name);
  return value ? atol(value) : 0;
}

static int below(const char *path) {
  const char *root = getenv("FAULTY_DISK");
  return root && *root && path && strncmp(path, root, strlen(root)) == 0;
}

static int descriptor_below(int fd) {
  char link[64], path[4096];
  if (!getenv("FAULTY_DISK")) return 0;
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t length = readlink(link, path, sizeof path - 1);
  if (length <= 0) return 0;
  path[length] = 0;
  return below(path);
}

// Count an operation; whether the process has to die in it.
static int dies(void) {
  long pause = number("FAULTY_DISK_SLOW");
  if (pause) usleep(pause);
  return ++operations == number("FAULTY_DISK_KILL_AT");
}

static void die(void) {
  kill(getpid(), SIGKILL);
  pause();
}

// How many of some bytes there is room for; 0 with errno set if there is none.
static size_t fitting(size_t count) {
  long room = number("FAULTY_DISK_ROOM");
  if (room && written + (long)count > room) count = written < room ? room - written : 0;
  if (!count) errno = ENOSPC;
  written += count;
  return count;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

ssize_t write(int fd, const void *data, size_t count) {
  if (!descriptor_below(fd)) return REAL(write)(fd, data, count);
  if (dies()) {
    REAL(write)(fd, data, count / 2);
    die();
  }
  if (!count) return 0;
  return (count = fitting(count)) ? REAL(write)(fd, data, count) : -1;
}

ssize_t writev(int fd, const struct iovec *parts, int count) {
  if (!descriptor_below(fd)) return REAL(writev)(fd, parts, count);
  size_t total = 0;
  for (int i = 0; i < count; i++) total += parts[i].iov_len;
  if (dies()) {
    REAL(write)(fd, parts[0].iov_base, parts[0].iov_len / 2);
    die();
  }
  size_t fits = fitting(total);
  if (fits == total) return REAL(writev)(fd, parts, count);
  return fits ? REAL(write)(fd, parts[0].iov_base, fits < parts[0].iov_len ? fits : parts[0].iov_len) : -1;
}

ssize_t pwrite64(int fd, const void *data, size_t count, off64_t at) {
  if (!descriptor_below(fd)) return REAL(pwrite64)(fd, data, count, at);
  if (dies()) {
    REAL(pwrite64)(fd, data, count / 2, at);
    die();
  }
  return (count = fitting(count)) ? REAL(pwrite64)(fd, data, count, at) : -1;
}

#define COUNTED(result, name, parameters, arguments, touched) \
  result name parameters {                                    \
    if ((touched) && dies()) die();                           \
    return REAL(name) arguments;                              \
  }

COUNTED(int, fsync, (int fd), (fd), descriptor_below(fd))
COUNTED(int, rename, (const char *from, const char *to), (from, to), below(to))
COUNTED(int, renameat, (int a, const char *from, int b, const char *to), (a, from, b, to), below(to))
COUNTED(int, unlink, (const char *path), (path), below(path))
COUNTED(int, unlinkat, (int fd, const char *path, int flags), (fd, path, flags), descriptor_below(fd) || below(path))
COUNTED(int, rmdir, (const char *path), (path), below(path))
COUNTED(int, mkdir, (const char *path, mode_t mode), (path, mode), below(path))
