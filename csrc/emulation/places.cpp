#include "places.h"

#include <dlfcn.h>

#include <cstdio>
#include <cstring>
#include <vector>

namespace kvcache::emulation {
namespace {

constexpr Place kIsSite = Place(1) << 63;
std::vector<Site> sites;

// What addr2line says of addresses in this library, in lines; nothing if it is not there.
std::vector<std::string> look_up(const std::vector<const void*>& addresses, const char* options) {
  std::vector<std::string> lines;
  Dl_info info{};
  if (addresses.empty() || !dladdr(addresses[0], &info) || !info.dli_fname) return lines;
  std::string command = "LD_PRELOAD= addr2line " + std::string(options) + " -e '" + info.dli_fname + "'";
  for (const void* address : addresses) {
    char offset[32];
    std::snprintf(offset, sizeof offset, " 0x%zx",
                  size_t(static_cast<const char*>(address) - static_cast<const char*>(info.dli_fbase)));
    command += offset;
  }
  FILE* pipe = popen((command + " 2> /dev/null").c_str(), "r");
  if (!pipe) return lines;
  static char line[16384];
  while (std::fgets(line, sizeof line, pipe)) lines.emplace_back(line, std::strcspn(line, "\n"));
  pclose(pipe);
  return lines;
}

}  // namespace

Place place_of(Site site) {
  static size_t last = 0;
  auto same = [&](const Site& s) { return s.file == site.file && s.line == site.line; };
  if (last >= sites.size() || !same(sites[last])) {
    for (last = 0; last < sites.size() && !same(sites[last]); ++last) {}
    if (last == sites.size()) sites.push_back(site);
  }
  return kIsSite | last;
}

std::string text(Place place) {
  if (place & kIsSite) return text(sites[place & ~kIsSite]);
  std::string result;
  // -1: the call, not what follows it
  for (const std::string& line : look_up({reinterpret_cast<const char*>(place) - 1}, "-i")) {
    const size_t slash = line.rfind('/'), begin = slash == std::string::npos ? 0 : slash + 1;
    const std::string frame = line.substr(begin, line.find(' ', begin) - begin);
    // A kernel's own line is what a reader wants; those of the emulator around it are not.
    if (frame.find(".cu") == std::string::npos && !result.empty()) continue;
    result += (result.empty() ? "" : " in ") + frame;
  }
  return result.empty() ? "?" : result;
}

std::vector<std::string> function_names(const std::vector<const void*>& functions) {
  std::vector<std::string> names;
  // For each address the address, then pairs of a function and a place: the last of them is not inlined into another.
  const std::vector<std::string> lines = look_up(functions, "-a -f -i -C");
  for (size_t i = 0; i + 1 < lines.size();) {
    std::string name;
    for (++i; i < lines.size() && lines[i].rfind("0x", 0) != 0; i += 2) name = lines[i];
    for (const char* noise : {"void ", "kvcache::cuda::", "(anonymous namespace)::", "planted::"}) {
      for (size_t at; (at = name.find(noise)) != std::string::npos;) name.erase(at, std::strlen(noise));
    }
    names.push_back(name.substr(0, name.rfind('(')));
  }
  names.resize(functions.size(), "?");
  return names;
}

}  // namespace kvcache::emulation
