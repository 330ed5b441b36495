// The dispatcher ops, made known to torch by functions: bindings.cpp calls them once it knows that torch's version
// fits.
#pragma once

namespace rvsm {

void register_ops();        // of ops.cpp
void register_whole_ops();  // of whole_ops.cpp, after the others

}  // namespace rvsm
