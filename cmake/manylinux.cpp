// What headers of g++ 12 ask of the run-time libraries and manylinux_2_28 does not have there.
#include <new>
#include <sstream>

// glibc 2.32: shared_ptr asks whether there is one thread. 0 says that there may be more.
extern "C" {
[[gnu::visibility("hidden")]] char __libc_single_threaded = 0;
}

namespace std {

// GLIBCXX_3.4.29: an array of more bytes than there are addresses.
[[noreturn]] void __throw_bad_array_new_length() {
  throw std::bad_array_new_length();
}

// GLIBCXX_3.4.26 and 3.4.29: constructors without arguments, and str() of what is not needed any more.
template class basic_stringbuf<char>;
template class basic_ostringstream<char>;
template class basic_stringstream<char>;

}  // namespace std
