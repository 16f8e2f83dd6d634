/* Disk faults: a library to preload, whose file calls fail on purpose in the process that has called arm_faults().

   Calls are counted that work on files below a folder, or on descriptors of such files. At the chosen one the fault is injected: an error
   number, or a transfer of half the bytes. Each call, and the one that was hit, is noted in memory that forked processes share. */

#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/uio.h>
#include <unistd.h>

enum { READ = 1, WRITE = 2, MAKE = 4, SYNC = 8, REMOVE = 16, LOOK = 32, CLOSE = 64 };
enum { SHORT = -1, MOST_CALLS = 1 << 16 };

struct call { char name[16]; int kind; char path[108]; };
static struct { int count, hits, first_hit; struct call calls[MOST_CALLS]; } *shared;

static volatile int armed;
static char folder[PATH_MAX];
static int wanted, fault, stays, done;

/* Memory that is shared with processes that are forked from now on: forgets what was noted. */
void *new_record(void) {
    if (!shared) shared = mmap(NULL, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    shared->count = shared->hits = 0;
    shared->first_hit = -1;
    return shared;
}

/* From now on: fail at call `number` (from 0; -1 never) below `below` by error `number`, or SHORT; `forever` at all later ones too. */
void arm_faults(const char *below, int number, int error, int forever) {
    snprintf(folder, sizeof folder, "%s", below);
    wanted = number, fault = error, stays = forever, done = 0;
    armed = 1;
}

void disarm_faults(void) { armed = 0; }

static int applies(int kind, int first) {
    if (fault == SHORT) return kind & (READ | WRITE);
    if (fault == EIO) return 1;
    /* A full disk goes on deleting and closing; that a file system has no room even for that shows once at most. */
    return kind & (WRITE | MAKE | SYNC | (first && fault == EDQUOT ? REMOVE | CLOSE : 0));
}

static int is_below(const char *path) {
    size_t length = strlen(folder);
    return !strncmp(path, folder, length) && (path[length] == '/' || !path[length]);
}

static int path_of(int descriptor, char *path) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(link, path, PATH_MAX - 1);
    path[length < 0 ? 0 : length] = 0;
    return length > 0;
}

/* What is to become of a call: 0, the error number, or SHORT. */
static int judge(const char *name, int kind, int descriptor, const char *name_there) {
    if (!armed) return 0;
    int before = errno, verdict = 0;
    char path[2 * PATH_MAX];
    path[0] = 0;
    if (!name_there) path_of(descriptor, path);
    else if (name_there[0] == '/') snprintf(path, sizeof path, "%s", name_there);
    else {
        if (descriptor == AT_FDCWD) { if (!getcwd(path, PATH_MAX)) path[0] = 0; }
        else path_of(descriptor, path);
        size_t length = strlen(path);
        snprintf(path + length, sizeof path - length, "/%s", name_there);
    }
    if (is_below(path)) {
        int number = __atomic_fetch_add(&shared->count, 1, __ATOMIC_SEQ_CST);
        struct call *call = &shared->calls[number % MOST_CALLS];
        snprintf(call->name, sizeof call->name, "%s", name);
        call->kind = kind;
        const char *tail = path + strlen(folder);
        snprintf(call->path, sizeof call->path, "%s", *tail ? tail + 1 : ".");
        if (wanted >= 0 && number >= wanted && fault && (stays || !done) && applies(kind, !done)) {
            done = 1;
            verdict = fault;
            if (!shared->hits++) shared->first_hit = number % MOST_CALLS;
        }
    }
    errno = before;
    return verdict;
}

#define REAL(type, name, ...) \
    static type (*real)(__VA_ARGS__); \
    if (!real) real = (type (*)(__VA_ARGS__))dlsym(RTLD_NEXT, #name)

#define FAIL_IF(verdict, result) do { int why = (verdict); if (why > 0) { errno = why; return result; } } while (0)

/* A transfer past the page cache is in pieces of 512 bytes. */
static size_t half(int descriptor, size_t count) {
    int direct = fcntl(descriptor, F_GETFL) & O_DIRECT;
    return direct ? (count >= 1024 ? count / 2 / 512 * 512 : count) : (count > 1 ? count / 2 : count);
}

#define TRANSFER(name, kind, buffer_type) \
    ssize_t name(int descriptor, buffer_type buffer, size_t count) { \
        REAL(ssize_t, name, int, buffer_type, size_t); \
        int verdict = judge(#name, kind, descriptor, NULL); \
        FAIL_IF(verdict, -1); \
        return real(descriptor, buffer, verdict == SHORT ? half(descriptor, count) : count); \
    }
TRANSFER(read, READ, void *)
TRANSFER(write, WRITE, const void *)

#define TRANSFER_AT(name, kind, buffer_type) \
    ssize_t name(int descriptor, buffer_type buffer, size_t count, off_t offset) { \
        REAL(ssize_t, name, int, buffer_type, size_t, off_t); \
        int verdict = judge(#name, kind, descriptor, NULL); \
        FAIL_IF(verdict, -1); \
        return real(descriptor, buffer, verdict == SHORT ? half(descriptor, count) : count, offset); \
    }
TRANSFER_AT(pread, READ, void *)
TRANSFER_AT(pread64, READ, void *)
TRANSFER_AT(pwrite, WRITE, const void *)
TRANSFER_AT(pwrite64, WRITE, const void *)

/* Keep the first half of the bytes; return the number of segments. */
static int halved(int descriptor, const struct iovec *segments, int count, struct iovec *out) {
    size_t total = 0, kept = 0;
    for (int i = 0; i < count; i++) total += segments[i].iov_len;
    size_t most = half(descriptor, total);
    int number = 0;
    while (number < count && number < IOV_MAX && kept < most) {
        out[number] = segments[number];
        if (out[number].iov_len > most - kept) out[number].iov_len = most - kept;
        kept += out[number++].iov_len;
    }
    return number;
}

#define VECTOR(name, kind, parameters, types, rest) \
    ssize_t name parameters { \
        REAL(ssize_t, name, types); \
        struct iovec fewer[IOV_MAX]; \
        int verdict = judge(#name, kind, descriptor, NULL); \
        FAIL_IF(verdict, -1); \
        if (verdict == SHORT) { count = halved(descriptor, segments, count, fewer); segments = fewer; } \
        return real rest; \
    }
#define LIST(...) __VA_ARGS__
#define PLAIN (int descriptor, const struct iovec *segments, int count)
#define AT (int descriptor, const struct iovec *segments, int count, off_t offset)
#define AT2 (int descriptor, const struct iovec *segments, int count, off_t offset, int flags)
VECTOR(readv, READ, PLAIN, LIST(int, const struct iovec *, int), (descriptor, segments, count))
VECTOR(writev, WRITE, PLAIN, LIST(int, const struct iovec *, int), (descriptor, segments, count))
VECTOR(preadv, READ, AT, LIST(int, const struct iovec *, int, off_t), (descriptor, segments, count, offset))
VECTOR(preadv64, READ, AT, LIST(int, const struct iovec *, int, off_t), (descriptor, segments, count, offset))
VECTOR(pwritev, WRITE, AT, LIST(int, const struct iovec *, int, off_t), (descriptor, segments, count, offset))
VECTOR(pwritev64, WRITE, AT, LIST(int, const struct iovec *, int, off_t), (descriptor, segments, count, offset))
VECTOR(preadv2, READ, AT2, LIST(int, const struct iovec *, int, off_t, int), (descriptor, segments, count, offset, flags))
VECTOR(preadv64v2, READ, AT2, LIST(int, const struct iovec *, int, off_t, int), (descriptor, segments, count, offset, flags))
VECTOR(pwritev2, WRITE, AT2, LIST(int, const struct iovec *, int, off_t, int), (descriptor, segments, count, offset, flags))
VECTOR(pwritev64v2, WRITE, AT2, LIST(int, const struct iovec *, int, off_t, int), (descriptor, segments, count, offset, flags))

#define OPEN_KIND (flags & O_CREAT || (flags & O_TMPFILE) == O_TMPFILE ? MAKE : LOOK)
#define MODE_OF(last) int mode = 0; if (OPEN_KIND == MAKE) { va_list rest; va_start(rest, last); mode = va_arg(rest, int); va_end(rest); }
#define OPEN(name) \
    int name(const char *path, int flags, ...) { \
        MODE_OF(flags) \
        REAL(int, name, const char *, int, ...); \
        FAIL_IF(judge(#name, OPEN_KIND, AT_FDCWD, path), -1); \
        return real(path, flags, mode); \
    }
OPEN(open)
OPEN(open64)
#define OPENAT(name) \
    int name(int folder_descriptor, const char *path, int flags, ...) { \
        MODE_OF(flags) \
        REAL(int, name, int, const char *, int, ...); \
        FAIL_IF(judge(#name, OPEN_KIND, folder_descriptor, path), -1); \
        return real(folder_descriptor, path, flags, mode); \
    }
OPENAT(openat)
OPENAT(openat64)

#define ON_DESCRIPTOR(type, failed, name, kind, parameters, types, arguments) \
    type name parameters { \
        REAL(type, name, types); \
        FAIL_IF(judge(#name, kind, descriptor, NULL), failed); \
        return real arguments; \
    }
ON_DESCRIPTOR(int, -1, fsync, SYNC, (int descriptor), int, (descriptor))
ON_DESCRIPTOR(int, -1, fdatasync, SYNC, (int descriptor), int, (descriptor))
ON_DESCRIPTOR(int, -1, ftruncate, MAKE, (int descriptor, off_t size), LIST(int, off_t), (descriptor, size))
ON_DESCRIPTOR(int, -1, ftruncate64, MAKE, (int descriptor, off_t size), LIST(int, off_t), (descriptor, size))
ON_DESCRIPTOR(int, -1, fallocate, MAKE, (int descriptor, int mode, off_t offset, off_t size), LIST(int, int, off_t, off_t),
              (descriptor, mode, offset, size))
ON_DESCRIPTOR(int, -1, fallocate64, MAKE, (int descriptor, int mode, off_t offset, off_t size), LIST(int, int, off_t, off_t),
              (descriptor, mode, offset, size))
ON_DESCRIPTOR(int, -1, fstat, LOOK, (int descriptor, struct stat *status), LIST(int, struct stat *), (descriptor, status))
ON_DESCRIPTOR(int, -1, fstat64, LOOK, (int descriptor, struct stat64 *status), LIST(int, struct stat64 *), (descriptor, status))
ON_DESCRIPTOR(int, -1, fchmod, LOOK, (int descriptor, mode_t mode), LIST(int, mode_t), (descriptor, mode))
ON_DESCRIPTOR(int, -1, flock, LOOK, (int descriptor, int operation), LIST(int, int), (descriptor, operation))
ON_DESCRIPTOR(DIR *, NULL, fdopendir, LOOK, (int descriptor), int, (descriptor))

/* These return the error number. */
#define FALLOCATE(name) \
    int name(int descriptor, off_t offset, off_t size) { \
        REAL(int, name, int, off_t, off_t); \
        int verdict = judge(#name, MAKE, descriptor, NULL); \
        return verdict > 0 ? verdict : real(descriptor, offset, size); \
    }
FALLOCATE(posix_fallocate)
FALLOCATE(posix_fallocate64)

/* A descriptor is closed whatever the file system says. */
int close(int descriptor) {
    REAL(int, close, int);
    int verdict = judge("close", CLOSE, descriptor, NULL), result = real(descriptor);
    FAIL_IF(verdict, -1);
    return result;
}

#define ON_PATH(type, failed, name, kind, parameters, types, arguments) \
    type name parameters { \
        REAL(type, name, types); \
        FAIL_IF(judge(#name, kind, AT_FDCWD, path), failed); \
        return real arguments; \
    }
ON_PATH(int, -1, rename, MAKE, (const char *from, const char *path), LIST(const char *, const char *), (from, path))
ON_PATH(int, -1, link, MAKE, (const char *from, const char *path), LIST(const char *, const char *), (from, path))
ON_PATH(int, -1, symlink, MAKE, (const char *to, const char *path), LIST(const char *, const char *), (to, path))
ON_PATH(int, -1, mkdir, MAKE, (const char *path, mode_t mode), LIST(const char *, mode_t), (path, mode))
ON_PATH(int, -1, unlink, REMOVE, (const char *path), const char *, (path))
ON_PATH(int, -1, rmdir, REMOVE, (const char *path), const char *, (path))
ON_PATH(int, -1, chmod, LOOK, (const char *path, mode_t mode), LIST(const char *, mode_t), (path, mode))
ON_PATH(int, -1, access, LOOK, (const char *path, int mode), LIST(const char *, int), (path, mode))
ON_PATH(int, -1, truncate, MAKE, (const char *path, off_t size), LIST(const char *, off_t), (path, size))
ON_PATH(int, -1, truncate64, MAKE, (const char *path, off_t size), LIST(const char *, off_t), (path, size))
ON_PATH(int, -1, stat, LOOK, (const char *path, struct stat *status), LIST(const char *, struct stat *), (path, status))
ON_PATH(int, -1, stat64, LOOK, (const char *path, struct stat64 *status), LIST(const char *, struct stat64 *), (path, status))
ON_PATH(int, -1, lstat, LOOK, (const char *path, struct stat *status), LIST(const char *, struct stat *), (path, status))
ON_PATH(int, -1, lstat64, LOOK, (const char *path, struct stat64 *status), LIST(const char *, struct stat64 *), (path, status))
ON_PATH(int, -1, statvfs64, LOOK, (const char *path, struct statvfs64 *state), LIST(const char *, struct statvfs64 *), (path, state))
ON_PATH(DIR *, NULL, opendir, LOOK, (const char *path), const char *, (path))
ON_PATH(FILE *, NULL, fopen, LOOK, (const char *path, const char *mode), LIST(const char *, const char *), (path, mode))
ON_PATH(FILE *, NULL, fopen64, LOOK, (const char *path, const char *mode), LIST(const char *, const char *), (path, mode))

#define IN_FOLDER(name, kind, parameters, types, arguments) \
    int name parameters { \
        REAL(int, name, types); \
        FAIL_IF(judge(#name, kind, place, path), -1); \
        return real arguments; \
    }
IN_FOLDER(unlinkat, REMOVE, (int place, const char *path, int flags), LIST(int, const char *, int), (place, path, flags))
IN_FOLDER(mkdirat, MAKE, (int place, const char *path, mode_t mode), LIST(int, const char *, mode_t), (place, path, mode))
IN_FOLDER(fstatat, LOOK, (int place, const char *path, struct stat *status, int flags), LIST(int, const char *, struct stat *, int),
          (place, path, status, flags))
IN_FOLDER(fstatat64, LOOK, (int place, const char *path, struct stat64 *status, int flags),
          LIST(int, const char *, struct stat64 *, int), (place, path, status, flags))
IN_FOLDER(linkat, MAKE, (int from_place, const char *from, int place, const char *path, int flags),
          LIST(int, const char *, int, const char *, int), (from_place, from, place, path, flags))
IN_FOLDER(renameat, MAKE, (int from_place, const char *from, int place, const char *path), LIST(int, const char *, int, const char *),
          (from_place, from, place, path))

struct dirent64 *readdir64(DIR *stream) {
    /* The first of a folder's names asks the file system, for many at once. */
    static __thread DIR *last;
    REAL(struct dirent64 *, readdir64, DIR *);
    if (stream != last) FAIL_IF(judge("readdir64", LOOK, dirfd(stream), NULL), NULL);
    last = stream;
    return real(stream);
}

ssize_t sendfile64(int out, int in, off_t *offset, size_t count) {
    REAL(ssize_t, sendfile64, int, int, off_t *, size_t);
    int verdict = judge("sendfile64", WRITE, out, NULL);
    FAIL_IF(verdict, -1);
    return real(out, in, offset, verdict == SHORT && count > 1 ? count / 2 : count);
}
