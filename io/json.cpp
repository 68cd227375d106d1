// The rules for JSON from outside, on top of the parser.
#include "io/json.h"

#include <set>
#include <vector>

#include <expar/error.h>

namespace expar::io {
namespace {

constexpr int kMaxDepth = 32;

/// Whether the byte continues a character of UTF-8.
bool continues(char c) { return (static_cast<unsigned char>(c) & 0xC0U) == 0x80U; }

}  // namespace

std::string in_quotes(std::string_view text) {
  constexpr std::size_t kMaxShown = 120;
  std::string shown = "'";
  std::size_t length = text.size();
  if (length > kMaxShown) {
    length = kMaxShown;
    while (length > 0 && continues(text[length])) --length;
  }
  for (const char c : text.substr(0, length)) {
    const auto code = static_cast<unsigned char>(c);
    shown += code < 0x20 || code == 0x7F ? '?' : c;
  }
  return shown + (length < text.size() ? "...'" : "'");
}

nlohmann::json parse_json(std::string_view text, const std::string& what) {
  // The parser takes a zero byte for the end.
  if (const std::size_t zero = text.find('\0'); zero != std::string_view::npos) {
    throw Error(ErrorCode::io, what + " is not valid JSON at byte " + std::to_string(zero + 1));
  }
  std::vector<std::set<std::string>> keys;  // of the objects that are open
  const auto check = [&](int depth, nlohmann::json::parse_event_t event, nlohmann::json& parsed) {
    using Event = nlohmann::json::parse_event_t;
    if ((event == Event::object_start || event == Event::array_start) && depth >= kMaxDepth) {
      throw Error(ErrorCode::io, what + " nests deeper than " + std::to_string(kMaxDepth) + " levels");
    }
    if (event == Event::object_start) keys.emplace_back();
    if (event == Event::object_end) keys.pop_back();
    if (event == Event::key && !keys.back().insert(parsed.get<std::string>()).second) {
      throw Error(ErrorCode::io, what + " has the key " + in_quotes(parsed.get<std::string>()) + " twice");
    }
    return true;
  };
  try {
    return nlohmann::json::parse(text, check);
  } catch (const nlohmann::json::parse_error& error) {
    throw Error(ErrorCode::io, what + " is not valid JSON at byte " + std::to_string(error.byte));
  } catch (const nlohmann::json::exception&) {
    throw Error(ErrorCode::io, what + " holds a number that is out of range");
  }
}

}  // namespace expar::io
