#pragma once

#include <string>

namespace fastrnn {

// How this binary was compiled, one "key: value" a line.
std::string build_info();

}  // namespace fastrnn
