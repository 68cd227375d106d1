// The library's version; the number itself stands once, in the root CMakeLists.txt.
#include <expar/version.h>

namespace expar {

const char* version() noexcept { return EXPAR_VERSION; }

}  // namespace expar
