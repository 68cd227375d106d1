// include/expar/carried.h
#include <expar/carried.h>
#include <expar/communicator.h>

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>

#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#include "python/src/bind.h"
#include "python/src/error.h"
#include "python/src/interrupt.h"

namespace expar::python {
namespace {

using namespace nb::literals;

using Bytes = nb::ndarray<const std::uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

/// `frame` as an array that owns it.
nb::object array_of(std::vector<std::byte> frame) {
  auto* owned = new std::vector<std::byte>(std::move(frame));
  const nb::capsule owner(owned, [](void* p) noexcept { delete static_cast<std::vector<std::byte>*>(p); });
  const std::size_t size = owned->size();
  return nb::cast(nb::ndarray<nb::array_api, std::uint8_t>(owned->data(), 1, &size, owner), nb::rv_policy::reference);
}

/// A Carrier written in Python.
class PythonCarrier final : public Carrier {
 public:
  PythonCarrier(nb::object carrier, int rank) : carrier_(std::move(carrier)), rank_(rank) {}
  ~PythonCarrier() override {
    const nb::gil_scoped_acquire gil;
    carrier_.reset();
  }

  void open(const Deliveries& to) override {
    const nb::gil_scoped_acquire gil;
    carrier_.attr("open")(to);
  }
  void send(int peer, std::vector<std::byte> frame) override {
    const nb::gil_scoped_acquire gil;
    try {
      carrier_.attr("send")(peer, array_of(std::move(frame)));
    } catch (const nb::python_error& error) {
      throw as_error(error, rank_);
    }
  }
  Error settle(const Error& cause) override {
    const nb::gil_scoped_acquire gil;
    return as_error(carrier_.attr("settle")(exception_of(cause)), rank_);
  }
  void close(bool failed) override {
    const nb::gil_scoped_acquire gil;
    carrier_.attr("close")(failed);
  }

 private:
  nb::object carrier_;
  int rank_;
};

}  // namespace

void bind_carried(nb::module_& m) {
  nb::class_<Deliveries>(m, "Deliveries", R"(
Where the frames go that have come for one rank: for any thread, at any time.)")
      .def(
          "deliver",
          [](const Deliveries& to, int peer, const Bytes& frame) {
            const auto* data = reinterpret_cast<const std::byte*>(frame.data());
            const std::size_t size = frame.size();
            const nb::gil_scoped_release no_gil;
            to.deliver(peer, std::vector<std::byte>(data, data + size));
          },
          "peer"_a, "frame"_a, R"(
A frame of ``peer`` has come; one at a time, in the order they were sent in. One that cannot be ends the job with an
Internal that names the peer. Keeps a copy.

frame : [bytes] uint8
Raises BadArgument (no such peer).)")
      .def(
          "lost", [](const Deliveries& to, int peer, const std::string& why) { to.lost(peer, why); }, "peer"_a, "why"_a,
          Waits(), R"(
Nothing more will come from ``peer``, and why, in a few words. Unless it has left before, it counts as dead.

Raises BadArgument (no such peer).)")
      .def(
          "leave", [](const Deliveries& to) { to.leave(); }, Waits(),
          "This rank leaves: for a process that ends while its communicator is still there.");

  m.def(
      "make_carried",
      [](nb::object carrier, int rank, int size, double timeout) {
        const auto limit = seconds(timeout);
        auto transport = make_carried("carried", rank, size, std::make_shared<PythonCarrier>(std::move(carrier), rank));
        Communicator communicator(std::move(transport), limit);
        make_interruptible(communicator);
        return communicator;
      },
      "carrier"_a, "rank"_a, "size"_a, nb::kw_only(), "timeout"_a = 0.0, R"(
The communicator of ranks that share no memory, whose bytes ``carrier`` carries. It has these methods, called from any
thread:

open(deliveries)  : called once, first; what peers send to this rank goes to the Deliveries from now on
send(peer, frame) : queues ``frame`` ([bytes] uint8, an array by DLPack) for another rank and returns, without waiting;
                    frames to one peer arrive whole, in order; an exception makes the peer lost
settle(error)     : this rank fails with ``error``; returns the Error that is the cause on all ranks, the same on each
close(failed)     : the rank leaves, in good order or not; what is queued should still be sent

timeout : seconds that a call may wait; 0 is EXPAR_TIMEOUT, else 120
Not collective: ranks may come at any time. Raises BadArgument (no such rank), NoMemory, and what ``open`` raises.)");
}

}  // namespace expar::python
