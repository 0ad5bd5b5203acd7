/* Loaded with LD_PRELOAD: while the file $WSI_READ_ERRORS exists, reads of *.svs fail with EIO. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static int fails(int fd) {
  char link[64], path[4096];
  const char *flag = getenv("WSI_READ_ERRORS");
  ssize_t length;
  int before = errno, is_slide;
  if (flag == NULL || access(flag, F_OK) != 0) {
    errno = before;
    return 0;
  }
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  length = readlink(link, path, sizeof path);
  is_slide = length > 4 && memcmp(path + length - 4, ".svs", 4) == 0;
  errno = is_slide ? EIO : before;
  return is_slide;
}

ssize_t read(int fd, void *into, size_t count) {
  static ssize_t (*next)(int, void *, size_t);
  if (next == NULL) next = (ssize_t(*)(int, void *, size_t))dlsym(RTLD_NEXT, "read");
  return fails(fd) ? -1 : next(fd, into, count);
}

ssize_t pread(int fd, void *into, size_t count, off_t at) {
  static ssize_t (*next)(int, void *, size_t, off_t);
  if (next == NULL) next = (ssize_t(*)(int, void *, size_t, off_t))dlsym(RTLD_NEXT, "pread");
  return fails(fd) ? -1 : next(fd, into, count, at);
}

ssize_t pread64(int fd, void *into, size_t count, off64_t at) {
  static ssize_t (*next)(int, void *, size_t, off64_t);
  if (next == NULL) next = (ssize_t(*)(int, void *, size_t, off64_t))dlsym(RTLD_NEXT, "pread64");
  return fails(fd) ? -1 : next(fd, into, count, at);
}

size_t fread(void *into, size_t size, size_t count, FILE *file) {
  static size_t (*next)(void *, size_t, size_t, FILE *);
  if (next == NULL) next = (size_t(*)(void *, size_t, size_t, FILE *))dlsym(RTLD_NEXT, "fread");
  return fails(fileno(file)) ? 0 : next(into, size, count, file);
}
