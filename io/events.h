// TensorBoard's event files: what a training run shows of itself while it runs.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace expar::io {

/// CRC-32C (Castagnoli), as the records of event files carry it.
std::uint32_t crc32c(std::string_view bytes);

/// How often each value came. Bucket i holds what lies from bucket_limit[i - 1] (or min) to below bucket_limit[i].
struct Histogram {
  double min = 0, max = 0, num = 0, sum = 0, sum_squares = 0;
  std::vector<double> bucket_limit;
  std::vector<double> bucket;
};

/// The distribution of the numbers 0, 1, ..., of which number i came counts[i] times: bucket i is [i, i + 1).
Histogram histogram_of_counts(std::span<const std::int64_t> counts);

/// What is shown of one step.
class Summary {
 public:
  /// A point of the curve `tag`.
  void scalar(std::string_view tag, float value);
  void histogram(std::string_view tag, const Histogram& histogram);

  /// The protocol buffer tensorflow.Summary.
  const std::string& bytes() const { return bytes_; }

 private:
  void add(std::string_view tag, std::string_view value);
  std::string bytes_;
};

/// Makes `directory` with all above it, and makes sure that files can be written in it. Throws Error: io.
void prepare_log_directory(const std::string& directory);

/// A new file events.out.tfevents.SECONDS.HOST.PID.N in `directory`, beside those of earlier runs.
class EventWriter {
 public:
  /// Throws Error: as prepare_log_directory.
  explicit EventWriter(const std::string& directory);
  ~EventWriter();
  EventWriter(const EventWriter&) = delete;
  EventWriter& operator=(const EventWriter&) = delete;

  const std::string& path() const { return path_; }

  /// Returns when the operating system has it, so that a running TensorBoard sees it. Throws Error: io.
  void write(std::int64_t step, const Summary& summary);

 private:
  void append(const std::string& event);
  std::string path_;
  int file_ = -1;
};

}  // namespace expar::io
