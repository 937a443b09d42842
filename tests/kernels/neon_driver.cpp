// Runs the calls of an image on the CPU it is compiled for, and writes the image with their results.
//
//   neon_driver                           prints what nb_isas() says
//   neon_driver IMAGE OUT ISA THREADS
//
// An image (made by call_image.py) is memory: every structure and array that the calls need, where a pointer is an
// offset into the image, listed to be relocated. It begins with a Header.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "abi.h"

namespace {

enum Kind { kLinear = 0, kForward = 1, kLogits = 2 };

struct Header {
  int64_t sizes[14];  // of the structures, as Python knows them
  int64_t relocations, num_relocations, calls, num_calls;
};

struct Relocation { int64_t at, to; };

struct Call { int64_t kind, object, input, rows, output; };

constexpr int64_t kSizes[14] = {sizeof(NbLinear),    sizeof(NbInput),    sizeof(NbLinearGroup),
                               sizeof(NbRope),      sizeof(NbAttention), sizeof(NbDeltaNet), sizeof(NbShortConv),
                               sizeof(NbGatedMlp),  sizeof(NbExperts),   sizeof(NbPerLayerInput),
                               sizeof(NbPerLayerInputs),
                               sizeof(NbLayer),     sizeof(NbModel),    sizeof(NbBatch)};

[[noreturn]] void fail(const char* why) {
  fprintf(stderr, "neon_driver: %s\n", why);
  exit(1);
}

char* read(const char* path, size_t& size) {
  FILE* file = fopen(path, "rb");
  if (!file) fail("no image");
  fseek(file, 0, SEEK_END);
  size = ftell(file);
  rewind(file);
  char* data = (char*)aligned_alloc(64, (size + 63) / 64 * 64);
  if (fread(data, 1, size, file) != size) fail("the image cannot be read");
  fclose(file);
  return data;
}

void run(NbPool* pool, char* image, const Call& call) {
  float* output = (float*)(image + call.output);
  const float* input = (const float*)(image + call.input);
  if (call.kind == kLinear) nb_linear(pool, (const NbLinearGroup*)(image + call.object), input, call.rows, output);
  if (call.kind == kForward)
    nb_forward(pool, (const NbModel*)(image + call.object), (const NbBatch*)(image + call.input), output);
  if (call.kind == kLogits) nb_logits(pool, (const NbModel*)(image + call.object), input, call.rows, output);
}

}  // namespace

int main(int count, char** arguments) {
  if (count == 1) return printf("%s\n", nb_isas()) < 0;
  if (count != 5) fail("IMAGE OUT ISA THREADS");
  size_t size;
  char* image = read(arguments[1], size);
  const Header& header = *(const Header*)image;
  if (memcmp(header.sizes, kSizes, sizeof(kSizes))) fail("structures have other sizes than in Python");
  const Relocation* relocations = (const Relocation*)(image + header.relocations);
  for (int64_t i = 0; i < header.num_relocations; i++) *(char**)(image + relocations[i].at) = image + relocations[i].to;
  NbPool* pool = nb_pool_new(atoi(arguments[4]), arguments[3]);
  if (!pool) fail("no such instruction set");
  const Call* calls = (const Call*)(image + header.calls);
  for (int64_t i = 0; i < header.num_calls; i++) run(pool, image, calls[i]);
  nb_pool_free(pool);
  FILE* out = fopen(arguments[2], "wb");
  return !out || fwrite(image, 1, size, out) != size || fclose(out);
}
