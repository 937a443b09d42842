// The C interface: which instruction sets this machine has, the memory of a step, and the programs run on the team.
#include "isa.h"

#include <algorithm>
#include <new>
#include <string.h>
#include <string>
#include <vector>

#if defined(__x86_64__)
#include <cpuid.h>
namespace avx2 { extern const nibble::Kernels kKernels; }
namespace avxvnni { extern const nibble::Kernels kKernels; }
namespace avx512vnni { extern const nibble::Kernels kKernels; }
namespace avx512bf16 { extern const nibble::Kernels kKernels; }
#elif defined(__aarch64__)
#if !defined(__APPLE__)
#include <sys/auxv.h>
#endif
namespace neon { extern const nibble::Kernels kKernels; }
#endif

namespace {

using namespace nibble;

struct Isa {
  const char* name;
  const Kernels* kernels;
  bool (*runs)();
};

#if defined(__x86_64__)
bool leaf7(int subleaf, int reg, int bit) {
  unsigned r[4];
  return __get_cpuid_count(7, subleaf, &r[0], &r[1], &r[2], &r[3]) && (r[reg] >> bit & 1);
}

bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
bool has_avxvnni() { return has_avx2() && leaf7(1, 0, 4); }
bool has_avx512vnni() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni");
}
bool has_avx512bf16() { return has_avx512vnni() && leaf7(1, 0, 5); }

const Isa kIsas[] = {  // best first
    {"avx512bf16", &avx512bf16::kKernels, has_avx512bf16},
    {"avx512vnni", &avx512vnni::kKernels, has_avx512vnni},
    {"avxvnni", &avxvnni::kKernels, has_avxvnni},
    {"avx2", &avx2::kKernels, has_avx2},
};
#elif defined(__aarch64__)
// The dot product instructions: the first ARMv8 cores lack them (Cortex-A53 and A72), no Apple computer does.
bool has_dot_product() {
#if defined(__APPLE__)
  return true;
#else
  constexpr unsigned long kAsimdDp = 1ul << 20;  // HWCAP_ASIMDDP
  return getauxval(AT_HWCAP) & kAsimdDp;
#endif
}

const Isa kIsas[] = {{"neon", &neon::kKernels, has_dot_product}};
#endif

// Cuts one piece of memory into arrays of 64-byte aligned beginnings. The first pass, without memory, measures.
struct Arena {
  char* memory = nullptr;
  size_t used = 0;
  template <class T> T* take(size_t count) {
    T* place = memory ? reinterpret_cast<T*>(memory + used) : nullptr;
    used += (count * sizeof(T) + 127) & ~size_t(63);
    return place;
  }
};

struct InputSize {
  size_t data = 0, groups = 0;  // of one row
};

void widen(InputSize* sizes, const NbLinearGroup& group) {
  for (int i = 0; i < group.num_inputs; i++) {
    const NbInput& input = group.inputs[i];
    size_t data = size_t(input.k_padded) * (input.group ? 1 : 2);
    int columns = input.group ? input.group : input.sum_group;
    size_t groups = columns ? (input.k_padded + columns - 1) / columns : 0;
    if (data > sizes[i].data) sizes[i].data = data;
    if (groups > sizes[i].groups) sizes[i].groups = groups;
  }
}

void widen(InputSize* sizes, const NbGatedMlp& mlp) {
  widen(sizes, mlp.gate_up);
  widen(sizes, mlp.down);
}

void place_inputs(Arena& arena, StepBuffers& b, const InputSize* sizes, size_t rows) {
  for (int i = 0; i < NB_MAX_INPUTS; i++) {
    b.row_bytes[i] = sizes[i].data;
    b.row_groups[i] = sizes[i].groups;
    b.inputs[i] = arena.take<char>(rows * sizes[i].data);
    b.scales[i] = arena.take<float>(rows * sizes[i].groups);
    b.sums[i] = arena.take<int32_t>(rows * sizes[i].groups);
  }
}

// The most that any layer has.
struct ExpertSize {
  size_t count = 0, paths = 0, units = 0, latent = 0;
  void widen(const NbExperts& e, int tokens) {
    units = std::max(units, size_t(most_units(tokens, e)));
    count = std::max(count, size_t(e.num_experts));
    paths = std::max(paths, size_t(nibble::paths(e)));
    latent = std::max(latent, size_t(e.latent));
  }
};

void place_experts(Arena& arena, ExpertBuffers& b, const ExpertSize& size, size_t rows, size_t hidden) {
  size_t pairs = rows * size.paths;
  b.h = arena.take<float>(rows * hidden);
  b.latent = arena.take<float>(rows * size.latent);
  b.scores = arena.take<float>(rows * size.count);
  b.chosen = arena.take<int32_t>(pairs);
  b.weights = arena.take<float>(rows * (size.paths + 1));
  b.firsts = arena.take<int32_t>(size.count + 2);
  b.pair_tokens = arena.take<int32_t>(pairs);
  b.pair_experts = arena.take<int32_t>(pairs);
  b.pair_weights = arena.take<float>(pairs);
  b.units = arena.take<ExpertUnit>(size.units);
  b.num_units = arena.take<int32_t>(1);
}

void place_step(Arena& arena, StepBuffers& b, const InputSize* sizes, const NbModel& m, const NbBatch& batch,
                int threads) {
  size_t rows = batch.num_tokens;
  size_t qkv = 0, queries = 0, attended = 0, channels = 0, inner = 0, normed = 0;
  InputSize heads;  // of a row of what each head multiplies
  size_t head_rows = 0, partials = 0;
  ExpertSize experts;
  bool wanted[kQueryTile + 1] = {};
  for (int l = 0; l < m.num_layers; l++) {
    if (const NbGatedMlp* mlp = m.layers[l].mlp)
      inner = std::max(inner, rows * mlp->intermediate * (mlp->sparse ? 2 : 1));
    if (const NbLaurel* laurel = m.layers[l].laurel) {
      inner = std::max(inner, rows * laurel->rank);
      normed = m.hidden;
    }
    if (const NbExperts* e = m.layers[l].experts) {
      inner = std::max(inner, rows * paths(*e) * inner_width(*e));
      experts.widen(*e, batch.num_tokens);
    }
    if (const NbShortConv* conv = m.layers[l].short_conv) {
      qkv = std::max(qkv, 3 * size_t(conv->channels));
    }
    if (const NbDeltaNet* d = m.layers[l].delta_net) {
      qkv = std::max(qkv, size_t(width_of(*d)));
      channels = std::max(channels, size_t(channels_of(*d)));
      attended = std::max(attended, size_t(d->value_heads) * d->value_dim);
    }
    if (const NbMamba2* net = m.layers[l].mamba2) {
      qkv = std::max(qkv, size_t(width_of(*net)));
      channels = std::max(channels, size_t(convolved_of(*net)));
      attended = std::max(attended, size_t(net->heads) * net->head_dim);
    }
    if (const NbLatentAttention* a = m.layers[l].latent_attention) {
      qkv = std::max(qkv, size_t(width_of(*a)));
      channels = std::max(channels, size_t(a->num_heads) * (a->nope_dim + a->rope_dim));
      queries = std::max(queries, size_t(packed_width(*a)));
      attended = std::max(attended, size_t(a->num_heads) * a->value_dim);
      head_rows = std::max(head_rows, rows * a->num_heads);
      partials = std::max(partials, partial_numbers(*a, batch, threads));
      for (const NbLinearGroup* group : {&a->keys, &a->values}) widen(&heads, *group);
      wanted[unit_tokens(*a)] = true;
    }
    if (const NbAttention* a = m.layers[l].attention) {
      qkv = std::max(qkv, size_t(qkv_width(*a)));
      queries = std::max(queries, size_t(a->num_heads) * a->head_dim);
      attended = std::max(attended, size_t(a->num_heads) * a->head_dim);
      wanted[unit_tokens(*a)] = true;
    }
  }
  if (m.per_layer_inputs) inner = std::max(inner, rows * m.per_layer_inputs->width);
  place_inputs(arena, b, sizes, rows * std::max(size_t(1), experts.paths));
  b.qkv = arena.take<float>(rows * qkv);
  b.queries = arena.take<uint16_t>(rows * queries);
  b.attended = arena.take<float>(rows * attended);
  b.convolved = arena.take<float>(rows * channels);
  b.partials = arena.take<float>(partials);
  b.head_inputs = arena.take<char>(head_rows * heads.data);
  b.head_scales = arena.take<float>(head_rows * heads.groups);
  b.head_sums = arena.take<int32_t>(head_rows * heads.groups);
  b.inner = arena.take<float>(inner);
  b.y = arena.take<float>(rows * m.hidden);
  b.normed = arena.take<float>(rows * normed);
  b.streams = arena.take<float>(m.alt_up ? rows * m.alt_up->streams * m.hidden : 0);
  b.per_layer = arena.take<float>(m.per_layer_inputs ? rows * m.num_layers * m.per_layer_inputs->width : 0);
  if (experts.count) place_experts(arena, b.experts, experts, rows, m.hidden);
  for (int i = 0; i < m.num_ropes; i++) b.angles[i] = arena.take<float>(rows * m.ropes[i].dim);
  b.row_items = arena.take<int32_t>(rows);
  b.item_rows = arena.take<int32_t>(batch.num_items);
  for (int tokens = 1; tokens <= kQueryTile; tokens++)
    b.units[tokens] = {wanted[tokens] ? arena.take<Unit>(rows) : nullptr, 0};
}

// Which rows belong to which item, and the units of attention.
void lay_out(StepBuffers& b, const NbBatch& batch) {
  int row = 0;
  for (int i = 0; i < batch.num_items; i++) {
    int count = batch.items[i].count;
    b.item_rows[i] = row;
    for (int j = 0; j < count; j++) b.row_items[row + j] = i;
    for (int tokens = 1; tokens <= kQueryTile; tokens++) {
      Units& units = b.units[tokens];
      for (int first = 0; units.at && first < count; first += tokens)
        units.at[units.count++] = {i, first, std::min(count - first, tokens)};
    }
    row += count;
  }
}

}  // namespace

struct NbPool {
  Team* team;
  const Kernels* kernels;
};

extern "C" {

const char* nb_build(void) { return NB_SOURCES; }

int32_t nb_abi_version(void) { return NB_ABI_VERSION; }

const char* nb_isas(void) {
  static const std::string names = [] {
    std::string found;
    for (const Isa& isa : kIsas)
      if (isa.runs()) found += (found.empty() ? "" : ",") + std::string(isa.name);
    return found;
  }();
  return names.c_str();
}

NbPool* nb_pool_new(int32_t threads, const char* isa) {
  for (const Isa& known : kIsas)
    if (strcmp(known.name, isa) == 0 && known.runs()) return new NbPool{team_new(threads), known.kernels};
  return nullptr;
}

void nb_pool_free(NbPool* pool) {
  team_free(pool->team);
  delete pool;
}

void nb_forward(NbPool* pool, const NbModel* model, const NbBatch* batch, float* hidden) {
  InputSize sizes[NB_MAX_INPUTS];
  for (int l = 0; l < model->num_layers; l++) {
    const NbLayer& layer = model->layers[l];
    if (has_mixer(layer))
      for (const NbLinearGroup* group : {&mixer_in(layer), &mixer_out(layer)}) widen(sizes, *group);
    if (layer.latent_attention) widen(sizes, layer.latent_attention->q_b);
    if (layer.mlp) widen(sizes, *layer.mlp);
    if (const NbExperts* e = layer.experts) {
      for (int i = 0; i < e->num_experts; i++) widen(sizes, e->experts[i]);
      if (e->shared) widen(sizes, *e->shared);
      if (e->latent)
        for (const NbLinearGroup* group : {&e->into, &e->out_of}) widen(sizes, *group);
    }
    if (const NbPerLayerInput* input = layer.per_layer_input)
      for (const NbLinearGroup* group : {&input->gate, &input->projection}) widen(sizes, *group);
    if (const NbLaurel* laurel = layer.laurel)
      for (const NbLinearGroup* group : {&laurel->left, &laurel->right}) widen(sizes, *group);
  }
  if (model->per_layer_inputs) widen(sizes, model->per_layer_inputs->projection);
  if (const NbAltUp* alt_up = model->alt_up) {
    widen(sizes, alt_up->into);
    for (int i = 0; i < alt_up->streams - 1; i++) widen(sizes, alt_up->back[i]);
  }
  StepBuffers buffers;
  Arena measure, arena;
  int threads = team_threads(pool->team);
  place_step(measure, buffers, sizes, *model, *batch, threads);
  arena.memory = team_buffer(pool->team, measure.used);
  place_step(arena, buffers, sizes, *model, *batch, threads);
  lay_out(buffers, *batch);
  StepJob job{model, batch, &buffers, hidden};
  team_run(pool->team, pool->kernels->forward, &job, 24 * model->num_layers + 64);
}

static void place_rows(NbPool* pool, const NbLinearGroup& group, int rows, StepBuffers& buffers) {
  InputSize sizes[NB_MAX_INPUTS];
  widen(sizes, group);
  Arena measure, arena;
  place_inputs(measure, buffers, sizes, rows);
  arena.memory = team_buffer(pool->team, measure.used);
  place_inputs(arena, buffers, sizes, rows);
}

void nb_logits(NbPool* pool, const NbModel* model, const float* hidden, int32_t rows, float* logits) {
  StepBuffers buffers;
  place_rows(pool, model->head, rows, buffers);
  LogitsJob job{model, &buffers, hidden, rows, logits};
  team_run(pool->team, pool->kernels->logits, &job, 2);
}

void nb_linear(NbPool* pool, const NbLinearGroup* group, const float* x, int32_t rows, float* y) {
  StepBuffers buffers;
  place_rows(pool, *group, rows, buffers);
  LinearJob job{group, &buffers, x, rows, y};
  team_run(pool->team, pool->kernels->linear, &job, 2);
}
}
