// Small charts for a terminal.
#pragma once

#include <cstdint>
#include <span>
#include <string>

namespace expar::cli {

/// One column per expert, half as high as possible where its load is the mean and full from twice the mean on:
/// "▂█▄▃▄▄▂▃". Beyond 64 experts, neighbours share a column that shows the larger.
std::string chart_of_loads(std::span<const std::int64_t> loads);

/// The largest load over the mean; 1 where nobody has any.
double max_over_mean(std::span<const std::int64_t> loads);

}  // namespace expar::cli
