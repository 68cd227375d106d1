// Lines that are read while they may be written.
//
// The writer marks the line, stores the words with release and the sequence last. A reader that has seen one new word
// (acquire) therefore sees the mark or the new sequence when it looks again, and knows that what it read is mixed.
#include "transports/shared/board.h"

#include <algorithm>
#include <cstring>

namespace expar::local {
namespace {

constexpr auto kAcquire = std::memory_order_acquire;
constexpr auto kRelease = std::memory_order_release;

std::size_t at(int index) { return static_cast<std::size_t>(index); }

}  // namespace

void write_line(RankArea& area, int index, const Line& line) {
  BoardLine& shown = area.lines[at(index)];
  shown.sequence.store(kBeingWritten, std::memory_order_relaxed);
  for (std::size_t i = 0; i < line.words.size(); ++i) shown.words[i].store(line.words[i], kRelease);
  shown.sequence.store(line.sequence);
}

std::string_view cut(std::string_view text) {
  if (text.size() <= kLineText) return text;
  std::size_t end = kLineText;
  // Not inside a character: continuation bytes of UTF-8 are 10xxxxxx.
  while (end > 0 && (static_cast<unsigned char>(text[end]) & 0xC0u) == 0x80u) --end;
  return text.substr(0, end);
}

void write_text(RankArea& area, int index, std::string_view text) {
  text = cut(text);
  area.lines[at(index)].sequence.store(kBeingWritten, std::memory_order_relaxed);
  BoardText& shown = area.texts[at(index)];
  for (std::size_t i = 0; i < shown.words.size(); ++i) {
    std::uint64_t word = 0;
    const std::size_t begin = 8 * i;
    if (begin < text.size()) {
      std::memcpy(&word, text.data() + begin, std::min<std::size_t>(8, text.size() - begin));
    }
    shown.words[i].store(word, kRelease);
    if (begin + 8 > text.size()) break;  // this word holds the end of the text
  }
}

Line read_line(const RankArea& area, int index) {
  const BoardLine& shown = area.lines[at(index)];
  Line line;
  line.sequence = shown.sequence.load();
  if (line.sequence == 0) return line;
  for (std::size_t i = 0; i < line.words.size(); ++i) line.words[i] = shown.words[i].load(kAcquire);
  if (line.sequence == kBeingWritten || shown.sequence.load(kAcquire) != line.sequence) return Line{};
  return line;
}

std::string read_text(const RankArea& area, int index) {
  const BoardLine& line = area.lines[at(index)];
  const std::uint64_t sequence = line.sequence.load();
  if (sequence == 0 || sequence == kBeingWritten) return {};
  std::array<char, kLineText> text{};
  for (std::size_t i = 0; i < text.size() / 8; ++i) {
    const std::uint64_t word = area.texts[at(index)].words[i].load(kAcquire);
    std::memcpy(text.data() + 8 * i, &word, 8);
    if (std::memchr(text.data() + 8 * i, 0, 8) != nullptr) break;
  }
  if (line.sequence.load(kAcquire) != sequence) return {};
  return std::string(text.data(), strnlen(text.data(), text.size()));
}

}  // namespace expar::local
