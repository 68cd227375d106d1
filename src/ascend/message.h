// A row of a dispatch as it travels, and the way of all of a rank's rows into it and out of it.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include <expar/ascend/domain.h>
#include <expar/context.h>
#include <expar/dispatch.h>

#include "src/ascend/copies.h"
#include "src/ascend/mail.h"
#include "src/ascend/quantise.h"

namespace expar::ascend {

/// Which of its source's rows a message is: slot K + j where it goes to shared expert j.
struct Sender {
  std::int32_t token, slot;
  float weight;
};

/// Values; scales from the next multiple of 32 bytes on; where `with_sender`, at the next one its Sender. Altogether a
/// multiple of 512 bytes.
struct Message {
  Quantisation quantisation;
  std::int64_t h = 0;
  bool with_sender = false;

  std::int64_t sender_at() const;
  std::int64_t bytes() const;
};

/// What a dispatch is given.
struct Sent {
  ConstTensor x;           // [BS, H]
  ConstTensor expert_ids;  // [BS, K]
  ConstTensor scales;      // see DispatchSetup
  std::int64_t quant_mode;
  std::optional<DType> y_dtype;
  ConstTensor weights = {};  // [BS, K] f32, of senders; absent: 1
};

/// How its rows travel. Throws Error: bad_argument.
Message message_of(const Sent& sent, bool with_sender);

/// The messages of all copies, in y [BS (K + SN) or more, bytes], and their mail.
Mail write_messages(const Context& group_ep, const Domain& domain, const Copies& copies, const Sent& sent,
                    const Message& message, Tensor y);

/// Where what came goes; absent where it is not wanted. Rows past those that came stay as they are.
struct Unpacked {
  Tensor expand_x;           // [A, H]
  Tensor dynamic_scales;     // [A] or [A, scales]
  Tensor expert_token_nums;  // [LE] int64
  std::int64_t expert_token_nums_type = 1;
  Tensor senders = {};  // [3 A or more] int32: rank, token and slot at 3 i
  Tensor weights = {};  // [A] f32
};

/// Throws Error: bad_argument (shapes).
void check_unpacked(const Domain& domain, const Message& message, const Unpacked& out);

/// Returns [LE, W] the rows of each source for each local expert, summed up to and with each. Throws Error:
/// bad_argument (more rows than expand_x has).
std::vector<std::int32_t> unpack(const Context& group_ep, const Domain& domain, const Inbox& inbox,
                                 const Message& message, const Unpacked& out);

/// What is compared between ranks and between setup and teardown.
std::vector<NamedNumber> numbers_of(const Sent& sent, const Message& message);

}  // namespace expar::ascend
