// Draws the curves of a plan as SVG.
#include "planner/picture.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>

namespace expar::planner {
namespace {

constexpr double kWidth = 1280, kHeight = 720;
constexpr double kLeft = 112, kRight = 960, kTop = 150, kBottom = 574;  // of the plot; right of it the lines' names
constexpr double kNameHeight = 58;                                      // of a line's name and value
constexpr double kMarkWidth = 300;                                      // of the words at a crossing
constexpr std::int64_t kMostPoints = 48;
constexpr std::size_t kMostLetters = 130;  // of the subtitle

constexpr const char* kStyle = R"(<style>
  text { font-family: Inter, "Segoe UI", "Helvetica Neue", Helvetica, Arial, "Liberation Sans", sans-serif; fill: #1d2433; }
  .card { fill: #ffffff; stroke: #d9dee8; }
  .title { font-size: 30px; font-weight: 600; }
  .sub, .axis, .tick, .value { fill: #5b6577; }
  .sub { font-size: 18px; } .axis { font-size: 17px; } .tick { font-size: 16px; } .value { font-size: 16px; }
  .name { font-size: 18px; font-weight: 600; }
  .mark { font-size: 19px; font-weight: 600; }
  .grid { stroke: #e6e9f0; } .base { stroke: #8b94a5; } .drop { stroke: #8b94a5; stroke-dasharray: 3 5; }
  .line { fill: none; stroke-width: 3.5; stroke-linecap: round; stroke-linejoin: round; }
  .ep { stroke: #0b6bcb; } .slot { stroke: #c2500a; } .tp { stroke: #4a5263; stroke-dasharray: 11 8; }
  text.ep, text.slot, text.tp { stroke: none; }
  text.ep { fill: #0b6bcb; } text.slot { fill: #c2500a; } text.tp { fill: #4a5263; }
  .dot { stroke: #ffffff; stroke-width: 2.5; } .dot.ep { fill: #0b6bcb; } .dot.slot { fill: #c2500a; }
  .ring { fill: #ffffff; stroke: #1d2433; stroke-width: 3; }
  @media (prefers-color-scheme: dark) {
    text { fill: #eef1f6; } .card { fill: #151a23; stroke: #2d3544; }
    .sub, .axis, .tick, .value { fill: #a5afc0; }
    .grid { stroke: #262d3a; } .base, .drop { stroke: #768093; }
    .ep { stroke: #5cb0ff; } .slot { stroke: #ff9a57; } .tp { stroke: #c3cad6; }
    text.ep { fill: #5cb0ff; } text.slot { fill: #ff9a57; } text.tp { fill: #c3cad6; }
    .dot { stroke: #151a23; } .dot.ep { fill: #5cb0ff; } .dot.slot { fill: #ff9a57; }
    .ring { fill: #151a23; stroke: #eef1f6; }
  }
</style>
)";

template <class... Values>
std::string formatted(const char* format, Values... values) {
  std::array<char, 512> text;
  const int length = std::snprintf(text.data(), text.size(), format, values...);
  return {text.data(), std::min(static_cast<std::size_t>(length), text.size() - 1)};
}

std::string escaped(const std::string& text) {
  std::string safe;
  for (const char c : text) {
    if (c == '&') {
      safe += "&amp;";
    } else if (c == '<') {
      safe += "&lt;";
    } else {
      safe += c;
    }
  }
  return safe;
}

/// 1, 2 or 5 times a power of ten, so that `range` has four to ten of them.
double step_of(double range) {
  const double power = std::pow(10, std::floor(std::log10(range / 4)));
  const double mantissa = range / 4 / power;
  return power * (mantissa >= 5 ? 5 : mantissa >= 2 ? 2 : 1);
}

struct Scale {
  double from_low, from_high, to_low, to_high;
  double operator()(double value) const {
    return to_low + (value - from_low) / (from_high - from_low) * (to_high - to_low);
  }
};

std::string shortened(const std::string& words) {
  return words.size() <= kMostLetters ? words : words.substr(0, kMostLetters) + " ...";
}

/// "5 MB": of a tick, so without zeros behind the point.
std::string round_bytes(double bytes) {
  std::string shown = shown_bytes(bytes);
  const std::size_t end = shown.find(' ');
  std::size_t keep = end;
  if (shown.find('.') < end) {
    while (shown[keep - 1] == '0') --keep;
    if (shown[keep - 1] == '.') --keep;
  }
  return shown.erase(keep, end - keep);
}

std::string text(double x, double y, const char* classes, const char* anchor, const std::string& words) {
  return formatted(R"(<text x="%.1f" y="%.1f" class="%s" text-anchor="%s">)", x, y, classes, anchor) + escaped(words) +
         "</text>\n";
}

/// A line of the picture, its values per rank.
struct Line {
  const char* classes;
  std::string name;
  std::vector<std::int64_t> topk;
  std::vector<double> bytes;
  double here = 0;  // at the layer's own K
};

std::string drawn(const Line& line, const Scale& x, const Scale& y) {
  std::string path;
  for (std::size_t i = 0; i < line.topk.size(); ++i) {
    path += formatted("%s%.1f %.1f", i == 0 ? "M" : " L", x(static_cast<double>(line.topk[i])), y(line.bytes[i]));
  }
  return formatted(R"(<path class="line %s" d=")", line.classes) + path + "\"/>\n";
}

/// Names beside the ends of the lines, moved apart where they would overlap.
std::string names(const std::vector<Line>& lines, std::int64_t topk, const Scale& y) {
  struct Name {
    const Line* line;
    double y;
  };
  std::vector<Name> all;
  for (const Line& line : lines) all.push_back({&line, y(line.bytes.back())});
  std::stable_sort(all.begin(), all.end(), [](const Name& a, const Name& b) { return a.y < b.y; });
  double least = kTop + 12;
  for (Name& name : all) {
    name.y = std::max(name.y, least);
    least = name.y + kNameHeight;
  }
  double most = kBottom - 24;
  for (auto name = all.rbegin(); name != all.rend(); ++name) {
    name->y = std::min(name->y, most);
    most = name->y - kNameHeight;
  }
  std::string svg;
  for (const Name& name : all) {
    svg += formatted(R"(<path class="line %s" d="M%.1f %.1f H%.1f"/>)", name.line->classes, kRight + 16, name.y,
                     kRight + 44) +
           "\n";
    svg += text(kRight + 56, name.y + 6, ("name " + std::string(name.line->classes)).c_str(), "start", name.line->name);
    svg += text(kRight + 56, name.y + 28, "value", "start",
                shown_bytes(name.line->here) + " at top-k " + std::to_string(topk));
  }
  return svg;
}

std::string axes(const Scale& x, const Scale& y) {
  std::string svg;
  const double bytes = step_of(y.from_high);
  for (double tick = 0; tick <= y.from_high * 1.0001; tick += bytes) {
    svg +=
        formatted(R"(<path class="%s" d="M%.1f %.1f H%.1f"/>)", tick == 0 ? "base" : "grid", kLeft, y(tick), kRight) +
        "\n" + text(kLeft - 12, y(tick) + 6, "tick", "end", tick == 0 ? "0" : round_bytes(tick));
  }
  const double choices = std::max(1.0, step_of(x.from_high));
  for (double tick = choices; tick <= x.from_high * 1.0001; tick += choices) {
    svg += text(x(tick), kBottom + 28, "tick", "middle", formatted("%.0f", tick));
  }
  return svg + text((kLeft + kRight) / 2, kBottom + 60, "axis", "middle", "top-k: experts that each token visits");
}

std::string ring_at(double x, double y) {
  return formatted(R"(<circle class="ring" cx="%.1f" cy="%.1f" r="8"/>)", x, y) + "\n";
}

std::string drop(double x, double from) {
  return formatted(R"(<path class="drop" d="M%.1f %.1f V%.1f"/>)", x, from, kBottom) + "\n";
}

/// The first top-k at which a line is not below that of TP: a ring on the line, and words where no line is. There is
/// none above TP's line and left of the first crossing, nor below it and right of the later one; where that is too
/// narrow, near the left end or the axis, there is none at the top either.
std::string crossings(const Answer& answer, const Scale& x, double slot, double ep, double tp) {
  std::string svg;
  if (answer.crossover) {
    const double at = x(static_cast<double>(*answer.crossover));
    const bool left = at - kLeft > kMarkWidth;
    const double beside = left ? at - 14 : at + 14;
    const double above = left ? slot - 42 : kTop + 14;
    const char* const anchor = left ? "end" : "start";
    svg += drop(at, left ? slot : kTop) + ring_at(at, slot);
    svg += text(beside, above, "mark", anchor, "crossover at top-k " + std::to_string(*answer.crossover));
    svg += text(beside, above + 24, "value", anchor, "fewer choices: EP sends less than TP");
  } else {
    svg += text(kLeft + 14, tp + 32, "value", "start", "no crossover: there are not so many experts");
  }
  if (answer.crossover_once) {
    const double at = x(static_cast<double>(*answer.crossover_once));
    const bool below = tp + 72 < kBottom;
    const double beside = below ? tp + 32 : kTop + 78;
    svg += drop(at, below ? ep : beside - 14) + ring_at(at, ep);
    svg += text(at + 14, beside, "mark", "start", "top-k " + std::to_string(*answer.crossover_once));
    svg += text(at + 14, beside + 24, "value", "start", "where rows go once");
  }
  return svg;
}

/// The K of the points: all of them, or as many as a line needs.
std::vector<std::int64_t> choices_up_to(std::int64_t most) {
  std::vector<std::int64_t> choices = {0};
  const std::int64_t points = std::min(most, kMostPoints);
  for (std::int64_t i = 1; i <= points; ++i) choices.push_back(i * most / points);
  return choices;
}

/// The right end of the axis: beyond both crossings and the layer's own K.
double last_choice(const Question& question, const Answer& answer) {
  double last = std::max<double>(4, 1.25 * static_cast<double>(question.sizes.topk));
  if (answer.crossover) last = std::max(last, 1.75 * static_cast<double>(*answer.crossover));
  if (answer.crossover_once) last = std::max(last, 1.5 * static_cast<double>(*answer.crossover_once));
  return std::ceil(last);
}

const Traffic& traffic_of(const Answer& answer, const std::string& key) {
  return std::find_if(answer.ways.begin(), answer.ways.end(), [&](const Way& way) { return way.key == key; })->traffic;
}

}  // namespace

std::string shown_bytes(double bytes) {
  constexpr std::array<const char*, 5> kUnits = {"B", "KB", "MB", "GB", "TB"};
  std::size_t unit = 0;
  // What rounds to four digits takes the next unit.
  while (unit + 1 < kUnits.size() && bytes >= 999.5) {
    bytes /= 1000;
    ++unit;
  }
  const int decimals = bytes >= 99.95 || unit == 0 ? 0 : bytes >= 9.995 ? 1 : 2;
  return formatted("%.*f %s", decimals, bytes, kUnits[unit]);
}

std::string picture(const Question& question, const Answer& answer, const std::string& subtitle) {
  const LayerSizes& sizes = question.sizes;
  const auto ranks = static_cast<double>(question.grid.ranks());
  const double last = last_choice(question, answer);
  const auto drawn_to = std::min(static_cast<std::int64_t>(last), sizes.experts);
  const double tp = traffic_of(answer, "tp").bytes() / ranks;

  // Of given routes the first choices are known up to their K, and rows per slot are in proportion beyond.
  const std::int64_t known = question.ids.empty() ? drawn_to : std::min(drawn_to, sizes.topk);
  Line ep{.classes = "ep", .name = "EP, rows go once", .topk = choices_up_to(known), .bytes = {}};
  for (const CurvePoint& point : curve(question, ep.topk)) ep.bytes.push_back(point.ep / ranks);
  ep.here = traffic_of(answer, "ep").bytes() / ranks;
  Line slot{.classes = "slot", .name = "EP, a row per slot", .topk = {0, drawn_to}, .bytes = {}};
  slot.here = traffic_of(answer, "ep_per_slot").bytes() / ranks;
  slot.bytes = {0, slot.here / static_cast<double>(sizes.topk) * static_cast<double>(drawn_to)};
  Line all{.classes = "tp", .name = "TP, all-reduce", .topk = {0, static_cast<std::int64_t>(last)}, .bytes = {tp, tp}};
  all.here = tp;
  const std::vector<Line> lines = {std::move(all), std::move(slot), std::move(ep)};

  const auto slot_at = [&](const std::optional<std::int64_t>& topk) {
    return topk ? lines[1].here / static_cast<double>(sizes.topk) * static_cast<double>(*topk) : 0;
  };
  const auto ep_at = [&](const std::optional<std::int64_t>& topk) {
    return topk ? curve(question, {*topk}).front().ep / ranks : 0;
  };
  double highest = 0;
  for (const Line& line : lines) highest = std::max(highest, *std::max_element(line.bytes.begin(), line.bytes.end()));
  const Scale x{0, last, kLeft, kRight};
  const Scale y{0, highest * 1.06, kBottom, kTop};
  const double own = x(static_cast<double>(sizes.topk));

  std::string svg =
      formatted(R"(<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %.0f %.0f" role="img">)", kWidth, kHeight) +
      "\n<title>Bytes that a rank sends against top-k</title>\n" + kStyle;
  svg += formatted(R"(<rect class="card" x="1" y="1" width="%.0f" height="%.0f" rx="18"/>)", kWidth - 2, kHeight - 2);
  svg += "\n" + text(48, 64, "title", "start", "What a rank sends for one MoE layer, forward");
  svg += text(48, 98, "sub", "start", shortened(subtitle));
  svg += axes(x, y);
  for (const Line& line : lines) svg += drawn(line, x, y);
  svg += crossings(answer, x, y(slot_at(answer.crossover)), y(ep_at(answer.crossover_once)), y(tp));
  for (std::size_t i = 1; i < lines.size(); ++i) {
    svg += formatted(R"(<circle class="dot %s" cx="%.1f" cy="%.1f" r="7"/>)", lines[i].classes, own, y(lines[i].here));
    svg += "\n";
  }
  svg += names(lines, sizes.topk, y);
  svg += text(48, kHeight - 34, "sub", "start",
              "Payload that a rank sends to others, mean. TP: a ring all-reduce of the tokens of all ranks.");
  return svg + "</svg>\n";
}

}  // namespace expar::planner
