#include "places.h"

#include <dlfcn.h>

#include <cstdio>
#include <cstring>
#include <vector>

namespace kvcache::emulation {
namespace {

constexpr Place kIsSite = Place(1) << 63;
std::vector<Site> sites;

std::string base_name(const std::string& path) {
  const size_t slash = path.rfind('/');
  return slash == std::string::npos ? path : path.substr(slash + 1);
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
  const char* address = reinterpret_cast<const char*>(place) - 1;  // of the call, not behind it
  Dl_info info{};
  if (!dladdr(address, &info) || !info.dli_fname) return "?";
  char command[1024];
  std::snprintf(command, sizeof command, "addr2line -i -e '%s' 0x%zx 2> /dev/null", info.dli_fname,
                size_t(address - static_cast<const char*>(info.dli_fbase)));
  std::string result;
  if (FILE* pipe = popen(command, "r")) {
    char line[1024];
    while (std::fgets(line, sizeof line, pipe)) {
      std::string frame = base_name(std::string(line, std::strcspn(line, " \n")));
      // A kernel's own line is what a reader wants; those of the emulator around it are not.
      if (frame.find(".cu") == std::string::npos && !result.empty()) continue;
      result += (result.empty() ? "" : " in ") + frame;
    }
    pclose(pipe);
  }
  return result.empty()
             ? std::string(info.dli_fname) + "+" + std::to_string(address - static_cast<const char*>(info.dli_fbase))
             : result;
}

}  // namespace kvcache::emulation
