// include/expar/random.h
#include <expar/random.h>

#include <nanobind/nanobind.h>
#include <nanobind/stl/string_view.h>

#include "python/src/bind.h"

namespace expar::python {

using namespace nb::literals;

void bind_random(nb::module_& m) {
  nb::class_<Random>(m, "Random", R"(
Random numbers that depend on what they are for, not on who draws them: keyed by (seed, stream, index).)")
      .def(nb::init<std::uint64_t, std::string_view>(), "seed"_a, "stream"_a, R"(
stream : names what they are for ("layers.0.experts.5.up"), so that a value is the same on whichever rank it is drawn)")
      .def("bits", &Random::bits, "index"_a, "64 bits.")
      .def("uniform", &Random::uniform, "index"_a, "In [0, 1), 24 bits.")
      .def("normal", &Random::normal, "index"_a, "Mean 0, variance 1.");
}

}  // namespace expar::python
