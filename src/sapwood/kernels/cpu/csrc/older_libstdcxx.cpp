// What newer libstdc++ headers call, for machines whose libstdc++ does not have it yet.
//
// A wheel that is to run wherever torch's does (manylinux_2_28) may need nothing that GCC 11 added to
// the shared library. The linker takes these definitions, which are hidden, instead of those.
#include <new>

#if defined(__GLIBCXX__) && defined(__linux__)

#define HIDDEN(name) __asm__(name) __attribute__((visibility("hidden"), used))

extern "C" {

// std::exception_ptr's copy constructor and destructor: of the library since GCC 4.
void sapwood_copy_exception_ptr(void* to, const void* from) noexcept
    __asm__("_ZNSt15__exception_ptr13exception_ptrC1ERKS0_");
void sapwood_destroy_exception_ptr(void* at) noexcept __asm__("_ZNSt15__exception_ptr13exception_ptrD1Ev");

void sapwood_throw_bad_array_new_length() HIDDEN("_ZSt28__throw_bad_array_new_lengthv");
void sapwood_add_reference(void* at) noexcept HIDDEN("_ZNSt15__exception_ptr13exception_ptr9_M_addrefEv");
void sapwood_release_reference(void* at) noexcept HIDDEN("_ZNSt15__exception_ptr13exception_ptr10_M_releaseEv");

// A std::exception_ptr is one pointer (the Itanium ABI).
struct SapwoodExceptionPtr {
  void* exception;
};

void sapwood_throw_bad_array_new_length() { throw std::bad_array_new_length(); }

// A copy that is never destroyed has added one reference.
void sapwood_add_reference(void* at) noexcept {
  SapwoodExceptionPtr copy;
  sapwood_copy_exception_ptr(&copy, at);
}

// As the library's own, it leaves the pointer where it is as long as others refer to it.
void sapwood_release_reference(void* at) noexcept {
  SapwoodExceptionPtr copy = *static_cast<SapwoodExceptionPtr*>(at);
  sapwood_destroy_exception_ptr(&copy);
}

}  // extern "C"

#endif
