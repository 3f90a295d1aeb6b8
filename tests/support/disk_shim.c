/* What a process does to its disk, recorded, and failing when told to. Loaded by LD_PRELOAD.
 *
 * Files below DISK_WATCH are watched; what happens to them goes to the file DISK_LOG, if that is
 * set, one record after the other, in the order in which it took effect. A record is a head (struct
 * below, little endian), the file's name and the bytes written.
 *
 * disk_note    puts a number of the process's own into the log.
 * disk_fail    lets the next `count` syncs of watched files fail with EIO.
 * disk_fail_after  the same, once `skip` more syncs were done.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <unistd.h>

struct head {
  int32_t kind; /* 'W'rite, 'T'runcate, 'S'ync, 'C'reate, 'U'nlink, 'N'ote */
  int32_t name_size;
  int64_t offset; /* of a write; the new size of a truncation; a note's number */
  int64_t size;   /* of the bytes written */
};

static pthread_mutex_t order = PTHREAD_MUTEX_INITIALIZER;
static atomic_int passing;
static atomic_int failing;

static int watched(const char* name) {
  const char* below = getenv("DISK_WATCH");
  return below != NULL && strncmp(name, below, strlen(below)) == 0;
}

static int name_of(int fd, char* name) {
  char link[64];
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t size = readlink(link, name, PATH_MAX - 1);
  if (size < 0) return 0;
  name[size] = '\0';
  return watched(name);
}

static void put(int fd, const void* data, size_t size) {
  const char* at = data;
  while (size > 0) {
    ssize_t n = syscall(SYS_write, fd, at, size);
    if (n <= 0) abort();
    at += n;
    size -= (size_t)n;
  }
}

static void record(int kind, const char* name, int64_t offset, const void* data, size_t size) {
  const char* log = getenv("DISK_LOG");
  if (log == NULL) return;
  int fd = (int)syscall(SYS_openat, AT_FDCWD, log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
  if (fd < 0) abort();
  struct head head = {kind, (int32_t)strlen(name), offset, (int64_t)size};
  put(fd, &head, sizeof head);
  put(fd, name, strlen(name));
  if (size > 0) put(fd, data, size);
  close(fd);
}

void disk_note(int64_t number) {
  pthread_mutex_lock(&order);
  record('N', "", number, NULL, 0);
  pthread_mutex_unlock(&order);
}

void disk_fail_after(int skip, int count) {
  atomic_store(&passing, skip);
  atomic_store(&failing, count);
}

void disk_fail(int count) { disk_fail_after(0, count); }

ssize_t pwrite64(int fd, const void* data, size_t size, off64_t offset) {
  char name[PATH_MAX];
  int seen = name_of(fd, name);
  pthread_mutex_lock(&order);
  ssize_t n = syscall(SYS_pwrite64, fd, data, size, offset);
  if (seen && n > 0) record('W', name, offset, data, (size_t)n);
  pthread_mutex_unlock(&order);
  return n;
}

ssize_t pwrite(int fd, const void* data, size_t size, off_t offset) {
  return pwrite64(fd, data, size, offset);
}

int ftruncate64(int fd, off64_t size) {
  char name[PATH_MAX];
  int seen = name_of(fd, name);
  pthread_mutex_lock(&order);
  int result = (int)syscall(SYS_ftruncate, fd, size);
  if (seen && result == 0) record('T', name, size, NULL, 0);
  pthread_mutex_unlock(&order);
  return result;
}

int ftruncate(int fd, off_t size) { return ftruncate64(fd, size); }

static int synced(int fd, long call) {
  char name[PATH_MAX];
  int seen = name_of(fd, name);
  if (seen && atomic_load(&failing) > 0 && atomic_fetch_sub(&passing, 1) <= 0) {
    atomic_fetch_sub(&failing, 1);
    errno = EIO;
    return -1;
  }
  pthread_mutex_lock(&order);
  int result = (int)syscall(call, fd);
  if (seen && result == 0) record('S', name, 0, NULL, 0);
  pthread_mutex_unlock(&order);
  return result;
}

int fsync(int fd) { return synced(fd, SYS_fsync); }

int fdatasync(int fd) { return synced(fd, SYS_fdatasync); }

static int opened(const char* name, int flags, mode_t mode) {
  int seen = (flags & O_CREAT) != 0 && watched(name);
  pthread_mutex_lock(&order);
  int fresh = seen && access(name, F_OK) != 0;
  int fd = (int)syscall(SYS_openat, AT_FDCWD, name, flags, mode);
  if (fresh && fd >= 0) record('C', name, 0, NULL, 0);
  pthread_mutex_unlock(&order);
  return fd;
}

int open64(const char* name, int flags, ...) {
  va_list more;
  va_start(more, flags);
  mode_t mode = (flags & (O_CREAT | O_TMPFILE)) != 0 ? va_arg(more, mode_t) : 0;
  va_end(more);
  return opened(name, flags, mode);
}

int open(const char* name, int flags, ...) {
  va_list more;
  va_start(more, flags);
  mode_t mode = (flags & (O_CREAT | O_TMPFILE)) != 0 ? va_arg(more, mode_t) : 0;
  va_end(more);
  return opened(name, flags, mode);
}

int unlink(const char* name) {
  pthread_mutex_lock(&order);
  int result = (int)syscall(SYS_unlinkat, AT_FDCWD, name, 0);
  if (result == 0 && watched(name)) record('U', name, 0, NULL, 0);
  pthread_mutex_unlock(&order);
  return result;
}
