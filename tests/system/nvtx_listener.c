/* What a profiler is to NVTX: the library in NVTX_INJECTION64_PATH.  Writes a line to $NVTX_LISTENER_LOG for each range
 * that a thread enters, "push DOMAIN PAYLOAD MESSAGE", or leaves, "pop DOMAIN".
 *
 * The types and numbers are those of NVTX 3, c/include/nvtx3/nvToolsExt.h and nvtxDetail/nvtxTypes.h in
 * https://github.com/NVIDIA/NVTX, as far as they are used here.
 */
#include <inttypes.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { CALLBACKS = 1, CORE2 = 5, PUSH = 4, POP = 5, REGISTER_STRING = 10, CREATE_DOMAIN = 12 };
enum { PAYLOAD_INT64 = 2, MESSAGE_REGISTERED = 3 };

typedef struct {
    uint16_t version, size;
    uint32_t category;
    int32_t color_type;
    uint32_t color;
    int32_t payload_type, reserved;
    int64_t payload;
    int32_t message_type;
    const char *message;
} Attributes;

typedef void (*Function)(void);
typedef struct {
    size_t size;
    int (*functions)(int module, Function ***table, unsigned *count);
} Callbacks;

static FILE *out;

/* Handles are the texts themselves, and last as long as the process. */
static const char *create_domain(const char *name) { return strdup(name); }
static const char *register_string(const char *domain, const char *text) { return strdup(text); }

static int push(const char *domain, const Attributes *what)
{
    if (what->payload_type != PAYLOAD_INT64 || what->message_type != MESSAGE_REGISTERED)
        fprintf(out, "push %s with payload type %d, message type %d\n", domain, what->payload_type, what->message_type);
    else
        fprintf(out, "push %s %" PRId64 " %s\n", domain, what->payload, what->message);
    return 0;
}

static int pop(const char *domain)
{
    fprintf(out, "pop %s\n", domain);
    return 0;
}

int InitializeInjectionNvtx2(const void *(*export_table)(uint32_t id))
{
    const Callbacks *callbacks = export_table(CALLBACKS);
    const char *path = getenv("NVTX_LISTENER_LOG");
    Function **table;
    unsigned count;

    if (!callbacks || !path || !callbacks->functions(CORE2, &table, &count) || count <= CREATE_DOMAIN)
        return 0;
    out = fopen(path, "a");
    if (!out)
        return 0;
    setvbuf(out, NULL, _IOLBF, BUFSIZ);
    *table[CREATE_DOMAIN] = (Function)create_domain;
    *table[REGISTER_STRING] = (Function)register_string;
    *table[PUSH] = (Function)push;
    *table[POP] = (Function)pop;
    return 1;
}
