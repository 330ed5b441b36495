// From a file of PTX to the lines of its kernels.

#include <cstdio>
#include <cstdlib>
#include <fstream>

#include "code.h"

namespace rvsm::ptx {

void cannot_decode(const std::string& file, int line, const std::string& text) {
  std::fprintf(stderr, "%s:%d: the interpreter does not know: %s\n", file.c_str(), line, text.c_str());
  std::exit(2);
}

namespace {

constexpr uint64_t kAllBytes = ~uint64_t(0);

bool begins_with(const std::string& s, const char* prefix) { return s.rfind(prefix, 0) == 0; }

// Without comments to the end of the line and blanks at both ends.
std::string stripped(std::string s) {
  s.resize(std::min(s.size(), s.find("//")));
  const size_t first = s.find_first_not_of(" \t\r");
  if (first == std::string::npos) return "";
  return s.substr(first, s.find_last_not_of(" \t\r") - first + 1);
}

class Parser {
 public:
  Parser(Module& module, const std::string& path) : module_(module), path_(path) {}

  void run() {
    std::ifstream in(path_);
    if (!in) {
      std::fprintf(stderr, "%s cannot be read\n", path_.c_str());
      std::exit(2);
    }
    for (std::string raw; std::getline(in, raw);) {
      ++number_;
      const std::string s = stripped(raw);
      if (s.empty() || is_comment(s)) continue;
      if (kernel_ == nullptr)
        outside(s);
      else if (in_header_)
        header(s);
      else
        body(s);
    }
    if (kernel_ != nullptr) refuse("the end of the file, inside a kernel");
  }

 private:
  [[noreturn]] void refuse(const std::string& s) const { cannot_decode(path_, number_, s); }

  // Comments of several lines stand on lines of their own.
  bool is_comment(const std::string& s) {
    if (!in_comment_ && !begins_with(s, "/*")) return false;
    in_comment_ = s.find("*/") == std::string::npos;
    return true;
  }

  void outside(const std::string& s) {
    const size_t entry = s.find(".entry ");
    if (entry == std::string::npos) {
      if (!begins_with(s, ".version") && !begins_with(s, ".target") && !begins_with(s, ".address_size")) refuse(s);
      return;
    }
    kernel_ = std::make_unique<Kernel>();
    kernel_->file = path_;
    kernel_->name = s.substr(entry + 7, s.find('(') - entry - 7);
    in_header_ = true;
  }

  // Name and size of `.param .align 8 .b8 NAME[SIZE]` and of a shared variable.
  std::pair<std::string, uint64_t> array(const std::string& s) const {
    const size_t open = s.find('['), close = s.find(']'), blank = s.rfind(' ', open);
    if (open == std::string::npos || close == std::string::npos || blank == std::string::npos) refuse(s);
    return {s.substr(blank + 1, open - blank - 1), std::stoull(s.substr(open + 1, close - open - 1))};
  }

  void header(const std::string& s) {
    if (s[0] == '{') {
      in_header_ = false;
    } else if (begins_with(s, ".param")) {
      if (kernel_->parameter_bytes != 0) refuse(s);  // every kernel has one table
      std::tie(kernel_->parameter, kernel_->parameter_bytes) = array(s);
    } else if (s[0] != ')' && !begins_with(s, ".maxntid") && !begins_with(s, ".minnctapersm")) {
      refuse(s);
    }
  }

  void body(const std::string& s) {
    if (s[0] == '}') return finish();
    if (begins_with(s, ".reg")) return;
    if (begins_with(s, ".shared")) {
      const auto [name, size] = array(s);
      kernel_->shared_bytes = (kernel_->shared_bytes + 15) / 16 * 16;
      kernel_->shared[name] = kernel_->shared_bytes;
      kernel_->shared_bytes += size;
    } else if (begins_with(s, ".pragma")) {
      const size_t mask = s.find("used_bytes_mask ");
      if (mask != std::string::npos) used_bytes_ = std::stoull(s.substr(mask + 16), nullptr, 0);
    } else if (s[0] == '{') {
      // The half of a register: { .reg .b32 tmp; mov.b64 {tmp, %r1}, %rd1; }
      if (!begins_with(s, "{ .reg .b32 tmp; mov.b64") || s.back() != '}') refuse(s);
      add(s.substr(s.find("mov."), s.rfind(';') - s.find("mov.")));
    } else if (s.back() == ':') {
      kernel_->labels[s.substr(0, s.size() - 1)] = int(kernel_->lines.size());
    } else {
      pending_ += (pending_.empty() ? "" : " ") + s;
      if (s.back() != ';') return;
      pending_.pop_back();
      add(pending_);
      pending_.clear();
    }
  }

  void add(const std::string& text) {
    kernel_->lines.push_back({text, number_, used_bytes_});
    used_bytes_ = kAllBytes;
  }

  void finish() {
    decode(*kernel_);
    const std::string name = kernel_->name;
    module_.kernels[name] = std::move(kernel_);
  }

  Module& module_;
  const std::string path_;
  std::unique_ptr<Kernel> kernel_;
  std::string pending_;
  int number_ = 0;
  uint64_t used_bytes_ = kAllBytes;
  bool in_header_ = false, in_comment_ = false;
};

}  // namespace

void Module::load(const std::string& path) { Parser(*this, path).run(); }

}  // namespace rvsm::ptx
