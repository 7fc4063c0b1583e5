/* A module for sapwood's gateway (and SGLang's), as label.wat: long requests are refused with 413;
   all others, and all answers, get the header x-label: seen.

   build.py makes a component of it. Values lie in memory as the canonical ABI of components says:
   https://github.com/WebAssembly/component-model/blob/main/design/mvp/CanonicalABI.md */

#include <stddef.h>
#include <stdint.h>

#define EXPORT(name) __attribute__((export_name(name)))

enum { MAX_BODY_BYTES = 100000, PAGE_BYTES = 65536 };

typedef struct {
  const char *at;
  uint32_t length;
} string;

typedef struct {
  string name, value;
} header;

typedef struct {
  const void *at;
  uint32_t length;
} list;

enum kind { CONTINUE, REJECT, MODIFY };

typedef struct {
  uint8_t kind;
  union {
    uint16_t rejected_with; /* a status */
    struct {
      struct {
        uint8_t is_given;
        uint16_t value;
      } status;
      list headers_set, headers_add; /* of headers */
      list headers_remove;           /* of strings */
      struct {
        uint8_t is_given;
        list value; /* of bytes */
      } body_replace;
    } changes;
  };
} action;

_Static_assert(offsetof(action, rejected_with) == 4, "after the kind, aligned");
_Static_assert(offsetof(action, changes.headers_set) == 8, "after the optional status");
_Static_assert(offsetof(action, changes.body_replace.value) == 36, "after whether it is given");
_Static_assert(sizeof(action) == 44, "nothing else");

/* Strings and lists come in through this function. Each call of a hook has an instance of the module
   for itself, so that nothing needs to be given back. */
EXPORT("realloc")
void *take(void *old, uint32_t old_size, uint32_t alignment, uint32_t size) {
  extern char __heap_base; /* the linker's: where free memory begins */
  static uintptr_t next;
  if (next == 0) next = (uintptr_t)&__heap_base;
  uintptr_t at = (next + alignment - 1) & -(uintptr_t)alignment;
  uintptr_t end = at + size;
  size_t had = __builtin_wasm_memory_size(0);
  if (end < at) __builtin_trap();
  size_t needed = end / PAGE_BYTES + 1;
  if (needed > had && __builtin_wasm_memory_grow(0, needed - had) == (size_t)-1) __builtin_trap();
  next = end;
  return (void *)at;
}

static const action *label(void) {
  static const header seen = {{"x-label", 7}, {"seen", 4}};
  static const action labelled = {.kind = MODIFY, .changes = {.headers_set = {&seen, 1}}};
  return &labelled;
}

/* A pointer and a length for each string and list: structures would come in memory instead. */
EXPORT("on-request")
const action *on_request(const char *method, uint32_t method_length, const char *path,
                         uint32_t path_length, const char *query, uint32_t query_length,
                         const header *headers, uint32_t num_headers, const uint8_t *body,
                         uint32_t body_length, const char *request_id, uint32_t request_id_length,
                         uint64_t now_epoch_ms) {
  static const action too_long = {.kind = REJECT, .rejected_with = 413};
  return body_length > MAX_BODY_BYTES ? &too_long : label();
}

EXPORT("on-response")
const action *on_response(uint32_t status, const header *headers, uint32_t num_headers,
                          const uint8_t *body, uint32_t body_length) {
  return label();
}
