/// Which expar is linked.
#pragma once

namespace expar {

/// The version of the library that is linked, as "major.minor.patch".
const char* version() noexcept;

}  // namespace expar
