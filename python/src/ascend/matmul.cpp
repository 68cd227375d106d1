// include/expar/ascend/matmul.h
#include "python/src/ascend/ascend.h"

namespace expar::python {

void bind_ascend_matmul(nb::module_& m) {
  m.def(
      "_ascend_grouped_matmul",
      [](const Context& c, const In& x, const In& weight, const In& bias, const In& scale, const In& per_token_scale,
         const In& group_list, std::int64_t group_type, std::int64_t group_list_type,
         const std::optional<std::string>& output_dtype) {
        return given(released([&] {
          return ascend::grouped_matmul(c, read(x, "x"), read(weight, "weight"),
                                        {.bias = read(bias, "bias"),
                                         .scale = read(scale, "scale"),
                                         .per_token_scale = read(per_token_scale, "per_token_scale"),
                                         .group_list = read(group_list, "group_list"),
                                         .group_type = group_type,
                                         .group_list_type = group_list_type,
                                         .output_dtype = dtype_named(output_dtype)});
        }));
      },
      "context"_a, "x"_a, "weight"_a, nb::kw_only(), "bias"_a.none(), "scale"_a.none(), "per_token_scale"_a.none(),
      "group_list"_a.none(), "group_type"_a, "group_list_type"_a, "output_dtype"_a.none(),
      "The rows of each group times its matrix, or the gradient of those matrices.");
}

}  // namespace expar::python
