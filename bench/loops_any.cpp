// Where no processor is known more closely.
#include "bench/loops.h"

namespace expar::bench {

Loops fastest_loops() { return portable_loops(); }

}  // namespace expar::bench
