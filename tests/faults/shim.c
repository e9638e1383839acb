/* Faults in the calls that a process makes to files below a folder, for LD_PRELOAD.

   fi_arm(calls, prefix, nth, kind, code) makes the `nth` matching call (0: every one) go wrong: `calls` are names with
   commas before, between and after, `prefix` begins the path of the file. A call that syncs a folder is named syncdir.
   The counter lies in memory that forks share, so that the parent of the process that made the call can read it. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum kind { NOTHING, FAIL, KILL, STOP, SHORT, LOSE, DONE, TEAR };

static struct {
    char calls[512], prefix[PATH_MAX];
    long nth;
    int kind, code, log;
} rule = {.log = -1};
static long *shared; /* matching calls so far, and how many of them went wrong */

__attribute__((constructor)) static void begin(void)
{
    shared = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
}

void fi_arm(const char *calls, const char *prefix, long nth, int kind, int code)
{
    shared[0] = shared[1] = 0;
    rule.nth = nth, rule.kind = kind, rule.code = code;
    strncpy(rule.calls, calls, sizeof rule.calls - 1);
    strncpy(rule.prefix, prefix, sizeof rule.prefix - 1);
}

void fi_log(const char *path)
{
    rule.log = (int)syscall(SYS_openat, AT_FDCWD, path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666);
}

long fi_hits(void) { return shared[1]; }

long fi_calls(void) { return shared[0]; }

static void resolve(int dir, const char *path, char *full)
{
    char link[64];
    ssize_t length = 0;
    if (path != NULL && path[0] == '/') {
        snprintf(full, PATH_MAX, "%s", path);
        return;
    }
    if (dir == AT_FDCWD)
        snprintf(link, sizeof link, "/proc/self/cwd");
    else
        snprintf(link, sizeof link, "/proc/self/fd/%d", dir);
    length = readlink(link, full, PATH_MAX - 1);
    full[length < 0 ? 0 : length] = 0;
    if (path != NULL && length > 0)
        snprintf(full + length, PATH_MAX - (size_t)length, "/%s", path);
}

/* What is to happen to this call; FAIL has set errno. A kill does not come back. */
static enum kind asks(const char *call, int dir, const char *path, const char *other)
{
    char full[PATH_MAX], name[32];
    int before = errno;
    if (rule.kind == NOTHING && rule.log < 0)
        return NOTHING;
    resolve(dir, path, full);
    if (rule.prefix[0] == 0 || strncmp(full, rule.prefix, strlen(rule.prefix)) != 0) {
        errno = before;
        return NOTHING;
    }
    if (rule.log >= 0) {
        char line[2 * PATH_MAX + 64];
        int length = snprintf(line, sizeof line, "%s\t%s\t%s\n", call, full, other == NULL ? "" : other);
        syscall(SYS_write, rule.log, line, (size_t)length);
    }
    errno = before;
    snprintf(name, sizeof name, ",%s,", call);
    if (rule.kind == NOTHING || strstr(rule.calls, name) == NULL)
        return NOTHING;
    long number = __sync_add_and_fetch(&shared[0], 1);
    if (rule.nth != 0 && number != rule.nth)
        return NOTHING;
    __sync_add_and_fetch(&shared[1], 1);
    if (rule.kind == KILL || rule.kind == STOP)
        syscall(SYS_kill, getpid(), rule.kind == KILL ? SIGKILL : SIGSTOP);
    if (rule.kind == FAIL)
        errno = rule.code;
    return rule.kind;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

/* Makes a call of `type` that has `fails` for a failure; `lost` is what it returns if it only pretends. */
#define CALL(type, call, dir, path, other, real, fails, lost) \
    do { \
        enum kind asked = asks(call, dir, path, other); \
        if (asked == FAIL) \
            return fails; \
        if (asked == LOSE) \
            return lost; \
        type result = (real); \
        if (asked == DONE) { \
            errno = rule.code; \
            return fails; \
        } \
        return result; \
    } while (0)

/* The same of a call that transfers `count` bytes. */
#define TRANSFER(call, fd, count, real) \
    do { \
        enum kind asked = asks(call, fd, NULL, NULL); \
        if (asked == FAIL) \
            return -1; \
        if (asked == LOSE) \
            return (ssize_t)(count); \
        size_t size = ((asked == SHORT || asked == TEAR) && (count) > 1) ? (count) / 2 : (count); \
        ssize_t result = (real); \
        if (asked == TEAR) \
            syscall(SYS_kill, getpid(), SIGKILL); \
        return result; \
    } while (0)

ssize_t write(int fd, const void *data, size_t count)
{
    TRANSFER("write", fd, count, REAL(write)(fd, data, size));
}

ssize_t pwrite(int fd, const void *data, size_t count, off_t at)
{
    TRANSFER("write", fd, count, REAL(pwrite)(fd, data, size, at));
}

ssize_t pwrite64(int fd, const void *data, size_t count, off64_t at)
{
    TRANSFER("write", fd, count, REAL(pwrite64)(fd, data, size, at));
}

ssize_t read(int fd, void *data, size_t count) { TRANSFER("read", fd, count, REAL(read)(fd, data, size)); }

ssize_t pread(int fd, void *data, size_t count, off_t at)
{
    TRANSFER("read", fd, count, REAL(pread)(fd, data, size, at));
}

ssize_t pread64(int fd, void *data, size_t count, off64_t at)
{
    TRANSFER("read", fd, count, REAL(pread64)(fd, data, size, at));
}

#define VECTORS(name, type) \
    ssize_t name(int fd, const struct iovec *parts, int count, type at) \
    { \
        struct iovec first = *parts; \
        TRANSFER("read", fd, first.iov_len, \
                 size == first.iov_len ? REAL(name)(fd, parts, count, at) : REAL(pread64)(fd, first.iov_base, size, at)); \
    }
VECTORS(preadv, off_t)
VECTORS(preadv64, off64_t)

#define VECTORS2(name, type) \
    ssize_t name(int fd, const struct iovec *parts, int count, type at, int flags) \
    { \
        struct iovec first = *parts; \
        TRANSFER("read", fd, first.iov_len, \
                 size == first.iov_len ? REAL(name)(fd, parts, count, at, flags) \
                                       : REAL(pread64)(fd, first.iov_base, size, at)); \
    }
VECTORS2(preadv2, off_t)
VECTORS2(preadv64v2, off64_t)

ssize_t copy_file_range(int from, off64_t *begin, int to, off64_t *at, size_t count, unsigned flags)
{
    TRANSFER("copy_file_range", to, count, REAL(copy_file_range)(from, begin, to, at, size, flags));
}

static const char *sync_name(int fd)
{
    struct stat found;
    return fstat(fd, &found) == 0 && S_ISDIR(found.st_mode) ? "syncdir" : "fsync";
}

int fsync(int fd) { CALL(int, sync_name(fd), fd, NULL, NULL, REAL(fsync)(fd), -1, 0); }

int fdatasync(int fd) { CALL(int, sync_name(fd), fd, NULL, NULL, REAL(fdatasync)(fd), -1, 0); }

int close(int fd) { CALL(int, "close", fd, NULL, NULL, REAL(close)(fd), -1, 0); }

int ftruncate(int fd, off_t size) { CALL(int, "ftruncate", fd, NULL, NULL, REAL(ftruncate)(fd, size), -1, 0); }

int ftruncate64(int fd, off64_t size) { CALL(int, "ftruncate", fd, NULL, NULL, REAL(ftruncate64)(fd, size), -1, 0); }

int fallocate(int fd, int mode, off_t at, off_t size)
{
    CALL(int, "fallocate", fd, NULL, NULL, REAL(fallocate)(fd, mode, at, size), -1, 0);
}

int fallocate64(int fd, int mode, off64_t at, off64_t size)
{
    CALL(int, "fallocate", fd, NULL, NULL, REAL(fallocate64)(fd, mode, at, size), -1, 0);
}

int sync_file_range(int fd, off64_t at, off64_t size, unsigned flags)
{
    CALL(int, "sync_file_range", fd, NULL, NULL, REAL(sync_file_range)(fd, at, size, flags), -1, 0);
}

int rename(const char *from, const char *to)
{
    CALL(int, "rename", AT_FDCWD, from, to, REAL(rename)(from, to), -1, 0);
}

int renameat(int at, const char *from, int there, const char *to)
{
    CALL(int, "rename", at, from, to, REAL(renameat)(at, from, there, to), -1, 0);
}

int link(const char *from, const char *to) { CALL(int, "link", AT_FDCWD, to, from, REAL(link)(from, to), -1, 0); }

int linkat(int at, const char *from, int there, const char *to, int flags)
{
    CALL(int, "link", there, to, from, REAL(linkat)(at, from, there, to, flags), -1, 0);
}

int symlink(const char *from, const char *to)
{
    CALL(int, "link", AT_FDCWD, to, from, REAL(symlink)(from, to), -1, 0);
}

int mkdir(const char *path, mode_t mode) { CALL(int, "mkdir", AT_FDCWD, path, NULL, REAL(mkdir)(path, mode), -1, 0); }

int mkdirat(int at, const char *path, mode_t mode)
{
    CALL(int, "mkdir", at, path, NULL, REAL(mkdirat)(at, path, mode), -1, 0);
}

int rmdir(const char *path) { CALL(int, "unlink", AT_FDCWD, path, NULL, REAL(rmdir)(path), -1, 0); }

int unlink(const char *path) { CALL(int, "unlink", AT_FDCWD, path, NULL, REAL(unlink)(path), -1, 0); }

int unlinkat(int at, const char *path, int flags)
{
    CALL(int, "unlink", at, path, NULL, REAL(unlinkat)(at, path, flags), -1, 0);
}

#define OPEN(name, declare, pass, at, path) \
    int name declare \
    { \
        mode_t mode = 0; \
        if (flags & (O_CREAT | O_TMPFILE)) { \
            va_list more; \
            va_start(more, flags); \
            mode = va_arg(more, mode_t); \
            va_end(more); \
        } \
        CALL(int, flags &O_CREAT ? "create" : "open", at, path, NULL, REAL(name) pass, -1, -1); \
    }
OPEN(open, (const char *path, int flags, ...), (path, flags, mode), AT_FDCWD, path)
OPEN(open64, (const char *path, int flags, ...), (path, flags, mode), AT_FDCWD, path)
OPEN(openat, (int dir, const char *path, int flags, ...), (dir, path, flags, mode), dir, path)
OPEN(openat64, (int dir, const char *path, int flags, ...), (dir, path, flags, mode), dir, path)
