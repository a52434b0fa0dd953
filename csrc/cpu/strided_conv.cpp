// Winograd on the polyphase form. In each dimension `up` is, for each of its two output phases, a
// convolution with two taps of the small map; `down` is the sum of two such convolutions, of the
// odd and of the even places of the big map. F(M, 2) makes each of them a few matrix products
//   [tiles x channels in] [channels in x channels out],
// whose left side is the transformed input and whose right side the transformed weight. Tiles
// reach over the borders, where the input counts as zero and the output is dropped.

#include "cpu/strided_conv.h"

#include <algorithm>
#include <cstring>

#include "cpu/gemm.h"
#include "cpu/parallel.h"
#include "cpu/tiles.h"
#include "cpu/winograd.h"

namespace pygan::PYGAN_ISA_NS {
namespace {

constexpr int64_t kWeightBytes = 64 << 20;  // of transformed weights at a time
constexpr int64_t kCachedBytes = 4 << 20;   // of transformed weights for several passes
constexpr int64_t kSharedBytes = 8 << 20;   // of transformed input that all threads read
constexpr int64_t kOwnBytes = 1 << 19;      // of transformed weights that one thread reads
// Of transformed input of one thread.
constexpr int64_t kInputBytes = Vec::width == 16 ? 1 << 19 : 3 << 19;
constexpr int64_t kGradientBytes = 10 << 20;  // of transformed maps in weight_grad
constexpr int64_t kOwnWords = 64;             // in weight_grad, of one thread at a time
constexpr int64_t kGradientRows = 8 * kBlockRows;

// What `up` and `down` have in common: which planes the input becomes and which of them each
// product multiplies. A pass computes `sets` output phases of `up`, or all of `down`.
template <class T, int M, bool Up>
struct Product {
  static constexpr int points = Winograd<M>::points;
  static constexpr int squares = points * points;
  static constexpr bool both_phases = Up && M == 2;
  static constexpr int sets = Up && !both_phases ? 1 : 4;  // phases or subgrids in a pass
  static constexpr int passes = Up && !both_phases ? 4 : 1;
  static constexpr int segments = Up ? 1 : 4;  // planes that add up in a product
  static constexpr int products = Up ? sets * squares : squares;
  static constexpr int planes = both_phases ? 25 : sets * squares;

  static constexpr int plane(int product, int segment) {
    if (!Up) return segment * squares + product;
    if (!both_phases) return product;
    const int phase = product / squares, point = product % squares;
    const int y = 2 * (phase / 2) + point / points, x = 2 * (phase % 2) + point % points;
    return y * 5 + x;
  }

  const StridedConvShape& shape;
  Map from, to;
  Tiles tiles;
  int64_t words, input_stride, columns, columns_at_once, block_rows, threads, column_shares;
  int64_t panel_words;  // of a segment of a column that are held at a time
  int teams;            // of threads, which share the passes and have scratch of their own
  int team_threads;     // at most
  int together;         // passes that a block of rows goes through while its input is in the caches
  bool by_columns;

  explicit Product(const StridedConvShape& s)
      : shape(s),
        from(Up ? small_map(s) : big_map(s)),
        to(Up ? big_map(s) : small_map(s)),
        tiles(s.batch, Up ? ceil_div(s.big_height, 2) : s.height,
              Up ? ceil_div(s.big_width, 2) : s.width, M) {
    words = panel_words = ceil_div(from.channels, kPerWord<T>);
    input_stride = row_stride(words);
    columns = ceil_div(to.channels, kBlockColumns);
    const int64_t weight_bytes = columns * products * segments * panel_stride() * 4;
    // Threads to which passes can be dealt evenly need nothing in common. What one writes and
    // another reads takes long where they sit far apart; a small weight is no matter.
    const bool dealt = passes * weight_bytes > kCachedBytes && passes % s.threads == 0;
    teams = dealt ? s.threads : 1;
    team_threads = s.threads / teams;
    // Where the weight is the larger side, threads share its columns: each transforms its own, as
    // much of a column at a time as its second cache keeps until it is multiplied, and all read
    // one transformed input. Elsewhere they share the rows.
    const int64_t input_bytes = planes * tiles.count * input_stride * 4;
    by_columns =
        M == 4 && input_bytes <= std::min(weight_bytes, kSharedBytes) && columns >= team_threads;
    if (by_columns) {
      const int64_t fit = kOwnBytes / (products * kBlockColumns * 4);
      const int64_t parts = ceil_div(words, std::max<int64_t>(fit, Vec::width));
      panel_words = round_up(ceil_div(words, parts), Vec::width);
      block_rows = round_up(tiles.count, 4);
      columns_at_once = column_shares = together = 1;
      threads = team_threads;
      return;
    }
    together = team_passes() * weight_bytes <= kCachedBytes ? team_passes() : 1;
    columns_at_once = ceil_div(columns, ceil_div(weight_bytes, kWeightBytes));
    // Blocks of rows that threads share evenly and that stay near the second cache.
    const int64_t most = std::clamp<int64_t>(kInputBytes / (planes * input_stride * 4),
                                             3 * kBlockRows, 8 * kBlockRows);
    const int64_t share = ceil_div(tiles.count, team_threads);
    const int64_t blocks = ceil_div(share, most);
    block_rows = round_up(ceil_div(share, blocks), 4);
    // Few rows and many threads: threads share the columns of a block as well.
    const int64_t row_blocks = ceil_div(tiles.count, block_rows);
    column_shares = std::clamp<int64_t>(team_threads / row_blocks, 1, columns_at_once);
    threads = std::min<int64_t>(team_threads, row_blocks * column_shares);
  }

  int team_passes() const { return passes / teams; }

  // One line more than the array needs, else the planes of one place fall on the same lines.
  int64_t panel_stride() const { return panel_words * kBlockColumns + kLine; }
  // Segments of a column whose transformed weight is held at a time.
  int held() const { return by_columns ? 1 : segments; }
  int64_t column_floats() const { return products * held() * panel_stride(); }
  int64_t plane_stride() const { return padded(block_rows) * input_stride + kLine; }
  int64_t product_stride() const { return padded(block_rows) * kBlockColumns + kLine; }
  // The last blocks of a multiplication may reach behind the rows.
  static int64_t padded(int64_t rows) { return round_up(rows, 4) + kBlockRows % 4; }

  struct Buffers {
    float* weight;  // columns, of each thread where threads share the columns:
                    // [product][segment][words][kBlockColumns]
    float* zeros;   // a pixel
    float* planes;  // [plane][row][words], of each thread where threads share the rows
    float* made;    // of each thread: [product][row][kBlockColumns]
  };
  int64_t planes_floats() const { return round_up(planes * plane_stride(), kLine); }
  int64_t made_floats() const { return round_up(products * product_stride(), kLine); }
  Buffers carve(Scratch& scratch) const {
    return {scratch.floats((by_columns ? threads : together * columns_at_once) * column_floats()),
            scratch.floats(from.channels),
            scratch.floats((by_columns ? 1 : threads) * planes_floats()),
            scratch.floats(threads * made_floats())};
  }

  // Tap of the 4x4 kernel along one dimension: the t-th of two that phase or subgrid `set` uses.
  static int tap(int set, int t) { return Up ? 3 - set - 2 * t : set + 2 * t; }

  // taps[k][4 * i + j] for Vec::width channels in from `k` and as many channels out from `n`: all
  // of them, or those of the one phase or subgrid `set`.
  void read_taps(const float* weight, int set, int64_t k, int64_t n, Vec (*taps)[16]) const {
    constexpr int W = Vec::width;
    const int rows = static_cast<int>(std::min<int64_t>(W, from.channels - k));
    const int lanes = static_cast<int>(std::min<int64_t>(W, to.channels - n));
    const int64_t B = shape.big_channels;
    if (shape.weight_layout == Layout::channels_last) {
      const bool one_set = sets == 1 || held() < segments;
      for (int i = 0; i < (one_set ? 4 : 16); ++i) {
        const int t = one_set ? 4 * tap(set / 2, i / 2) + tap(set % 2, i % 2) : i;
        Vec square[W];
        const int64_t first = Up ? k : n, other = Up ? n : k;
        const int count = Up ? rows : lanes, across = Up ? lanes : rows;
        for (int r = 0; r < W; ++r) {
          const float* from_row = weight + ((first + r) * 16 + t) * B + other;
          square[r] = r < count ? load(from_row, across) : Vec(0.0f);
        }
        if (!Up) transpose(square);
        for (int r = 0; r < W; ++r) taps[r][t] = square[r];
      }
    } else {
      const int64_t k_stride = Up ? B * 16 : 16, n_stride = Up ? 16 : B * 16;
      for (int r = 0; r < W; ++r) {
        for (int t = 0; t < 16; t += W) {
          Vec square[W];
          for (int i = 0; i < W; ++i) {
            const bool inside = r < rows && i < lanes;
            square[i] =
                inside ? load(weight + (k + r) * k_stride + (n + i) * n_stride + t) : Vec(0.0f);
          }
          transpose(square);
          for (int i = 0; i < W; ++i) taps[r][t + i] = square[i];
        }
      }
    }
  }

  // store(product, value)
  template <class Store>
  static inline __attribute__((always_inline)) void transform_weight(const Vec* taps, int set,
                                                                     const Store& store) {
    along_both<typename Winograd<M>::Weight>(
        [&](int i, int j) { return taps[4 * tap(set / 2, i) + tap(set % 2, j)]; },
        [&](int i, int j, Vec value) { store(i * points + j, value); });
  }

  // What is held of a column: held() segments, and of each the words from `word` on.
  struct Part {
    int segment = 0;
    int64_t word = 0;

    bool first() const { return segment == 0 && word == 0; }
  };

  // Transforms the weight of Vec::width channels in, from `k` on, for one block of columns: of
  // `up` all products, of `down` the segments that are held. Other threads read what is Shared.
  template <bool Shared>
  void pack(const float* weight, int pass, Part part, int64_t k, int64_t column,
            float* panels) const {
    constexpr int W = Vec::width;
    const int64_t step = held() * panel_stride();
    const int64_t rows = std::min<int64_t>(W, from.channels - k);
    Vec taps[W][16];
    for (int v = 0; v < kBlockVectors; ++v) {
      const int64_t n = column * kBlockColumns + v * W;
      if (n >= to.channels) break;
      read_taps(weight, Up ? pass : part.segment, k, n, taps);
      for (int i = 0; i < (Up ? sets : held()); ++i) {
        const int set = Up ? (sets == 1 ? pass : i) : part.segment + i;
        float* to_panel = panels + i * (Up ? squares : 1) * panel_stride() + v * W;
        for (int64_t r = 0; r < rows; r += kPerWord<T>) {
          float* row = to_panel + ((k + r) / kPerWord<T> - part.word) * kBlockColumns;
          if constexpr (kPairs<T>) {
            Vec even[squares];
            transform_weight(taps[r], set, [&](int p, Vec value) { even[p] = value; });
            transform_weight(taps[r + 1], set, [&](int p, Vec value) {
              store_words<Shared>(row + p * step, pair_up(even[p], value));
            });
          } else {
            transform_weight(taps[r], set,
                             [&](int p, Vec value) { store_words<Shared>(row + p * step, value); });
          }
        }
      }
    }
    if constexpr (Shared) fence();
  }

  void transform_rows(const Operand<T>& input, int pass, int64_t row, int64_t rows,
                      float* planes_out) const {
    using Line = std::conditional_t<both_phases, BothPhases, typename Winograd<M>::Input>;
    const int64_t plane_size = plane_stride();
    for (int64_t r = 0; r < rows; ++r) {
      const Tiles::Place at = tiles.place(row + r);
      float* to_row = planes_out + r * input_stride;
      prefetch_tile(input, tiles, row + r, {Up ? M : 2 * M, 0, 0, 1});
      if constexpr (Up) {
        const int64_t y = M * at.y - 1 + pass / 2, x = M * at.x - 1 + pass % 2;
        const Window<T, Line::in> window(input, at.image, y, x, 1);
        transform_input<Line>(window, from.channels, to_row, plane_size);
      } else {
        for (int set = 0; set < 4; ++set) {
          const int64_t y = 2 * M * at.y - 1 + set / 2, x = 2 * M * at.x - 1 + set % 2;
          const Window<T, Line::in> window(input, at.image, y, x, 2);
          transform_input<Line>(window, from.channels, to_row + set * squares * plane_size,
                                plane_size);
        }
      }
    }
  }

  // Products of the part that is held, added to those before it.
  template <int Rows, int Vectors>
  void multiply_rows(const float* input, const float* panel, int product, Part part,
                     float* made) const {
    Vec acc[Rows][Vectors];
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 2
      for (int j = 0; j < Vectors; ++j) {
        acc[i][j] = part.first() ? Vec(0.0f) : load(made + i * kBlockColumns + j * Vec::width);
      }
    }
    const int64_t depth = std::min(panel_words, words - part.word);
    for (int s = 0; s < held(); ++s) {
      accumulate<kPairs<T>, Rows, Vectors>(
          acc, input + plane(product, part.segment + s) * plane_stride() + part.word, input_stride,
          panel + s * panel_stride(), kBlockColumns, depth);
    }
    store_block(made, kBlockColumns, acc);
  }

  template <int Vectors>
  void multiply(const float* input, const float* panels, int64_t rows, Part part,
                float* made) const {
    for (int product = 0; product < products; ++product) {
      const float* panel = panels + product * held() * panel_stride();
      float* out = made + product * product_stride();
      for_row_blocks(rows, [&](auto count, int64_t r) {
        multiply_rows<decltype(count)::value, Vectors>(input + r * input_stride, panel, product,
                                                       part, out + r * kBlockColumns);
      });
    }
  }

  // Turns the products of one block of columns into output pixels.
  void transform_output(const float* made, const float* bias, int pass, int64_t row, int64_t rows,
                        int64_t column, T* output) const {
    using Line = typename Winograd<M>::Output;
    const int64_t C = to.channels, stride = product_stride();
    for (int v = 0; v < kBlockVectors; ++v) {
      const int64_t n = column * kBlockColumns + v * Vec::width;
      if (n >= C) return;
      const int lanes = static_cast<int>(std::min<int64_t>(Vec::width, C - n));
      const Vec shift = bias ? load(bias + n, lanes) : Vec(0.0f);
      for (int64_t r = 0; r < rows; ++r) {
        const Tiles::Place at = tiles.place(row + r);
        T* image = output + at.image * to.height * to.width * C + n;
        const float* m = made + r * kBlockColumns + v * Vec::width;
        for (int set = 0; set < (Up ? sets : 1); ++set) {
          const int phase = sets == 1 ? pass : set;
          const int64_t step = Up ? 2 : 1;
          const int64_t y = step * M * at.y + (Up ? phase / 2 : 0);
          const int64_t x = step * M * at.x + (Up ? phase % 2 : 0);
          const float* first = m + set * squares * stride;
          const auto product_at = [&](int i, int j) {
            return load(first + (i * points + j) * stride);
          };
          T* origin = image + (y * to.width + x) * C;
          const int64_t down = step * to.width * C, right = step * C;
          if (lanes == Vec::width && y + step * (M - 1) < to.height &&
              x + step * (M - 1) < to.width) {
            along_both<Line>(product_at, [&](int i, int j, Vec value) {
              store(origin + i * down + j * right, value + shift);
            });
          } else {
            along_both<Line>(product_at, [&](int i, int j, Vec value) {
              if (y + step * i < to.height && x + step * j < to.width) {
                store(origin + i * down + j * right, value + shift, lanes);
              }
            });
          }
        }
      }
    }
  }

  // One block of columns for one block of rows, as far as the part that is held goes.
  void multiply_column(const float* planes_in, const float* panels, int64_t rows, int64_t column,
                       Part part, float* made) const {
    if (to.channels - column * kBlockColumns > Vec::width) {
      multiply<2>(planes_in, panels, rows, part, made);
    } else {
      multiply<1>(planes_in, panels, rows, part, made);
    }
  }

  void run(const T* values, const MapNorm& norm, const float* weight, const float* bias, T* output,
           void* scratch) const {
    const int64_t bytes = team_bytes(*this);
    parallel_for(teams, teams, [&](int64_t team) {
      Scratch pieces(static_cast<char*>(scratch) + team * bytes);
      const Buffers buffers = carve(pieces);
      std::memset(buffers.zeros, 0, static_cast<size_t>(from.channels) * sizeof(float));
      const Operand<T> input{values, from, norm, reinterpret_cast<const T*>(buffers.zeros)};
      const int first = static_cast<int>(team) * team_passes(), last = first + team_passes();
      if (by_columns) {
        for (int pass = first; pass < last; ++pass) {
          share_columns(input, weight, bias, output, buffers, pass);
        }
        return;
      }
      for (int64_t column = 0; column < columns; column += columns_at_once) {
        for (int pass = first; pass < last; pass += together) {
          share_rows(input, weight, bias, output, buffers, pass, column);
        }
      }
    });
  }

  void share_columns(const Operand<T>& input, const float* weight, const float* bias, T* output,
                     const Buffers& buffers, int pass) const {
    parallel_for(team_threads, tiles.count, [&](int64_t row) {
      transform_rows(input, pass, row, 1, buffers.planes + row * input_stride);
    });
    parallel_for(team_threads, threads, [&](int64_t thread) {
      float* panels = buffers.weight + thread * column_floats();
      float* made = buffers.made + thread * made_floats();
      for (int64_t c = columns * thread / threads; c < columns * (thread + 1) / threads; ++c) {
        for (int segment = 0; segment < segments; ++segment) {
          for (int64_t word = 0; word < words; word += panel_words) {
            const Part part{segment, word};
            const int64_t end = std::min((word + panel_words) * kPerWord<T>, from.channels);
            for (int64_t k = word * kPerWord<T>; k < end; k += Vec::width) {
              pack<false>(weight, pass, part, k, c, panels);
            }
            multiply_column(buffers.planes, panels, tiles.count, c, part, made);
          }
        }
        transform_output(made, bias, pass, 0, tiles.count, c, output);
      }
    });
  }

  // For the passes from `pass_from` and the columns from `first` on that are held.
  void share_rows(const Operand<T>& input, const float* weight, const float* bias, T* output,
                  const Buffers& buffers, int pass_from, int64_t first) const {
    const int64_t group = std::min(columns_at_once, columns - first);
    const int64_t weight_blocks = ceil_div(from.channels, Vec::width);
    parallel_for(team_threads, together * group * weight_blocks, [&](int64_t item) {
      const int64_t panel = item / weight_blocks;
      const int pass = pass_from + static_cast<int>(panel / group);
      const int64_t k = item % weight_blocks * Vec::width, column = first + panel % group;
      float* panels = buffers.weight + panel * column_floats();
      if (team_threads > 1) {
        pack<true>(weight, pass, Part(), k, column, panels);
      } else {
        pack<false>(weight, pass, Part(), k, column, panels);
      }
    });
    const int64_t items = ceil_div(tiles.count, block_rows) * column_shares;
    parallel_for(team_threads, threads, [&](int64_t thread) {
      float* planes_in = buffers.planes + thread * planes_floats();
      float* made = buffers.made + thread * made_floats();
      for (int64_t i = items * thread / threads; i < items * (thread + 1) / threads; ++i) {
        const int64_t row = i / column_shares * block_rows, share = i % column_shares;
        const int64_t rows = std::min(block_rows, tiles.count - row);
        for (int p = 0; p < together; ++p) {
          const int pass = pass_from + p;
          const float* panels = buffers.weight + p * group * column_floats();
          transform_rows(input, pass, row, rows, planes_in);
          for (int64_t c = group * share / column_shares; c < group * (share + 1) / column_shares;
               ++c) {
            multiply_column(planes_in, panels + c * column_floats(), rows, first + c, Part(), made);
            transform_output(made, bias, pass, row, rows, first + c, output);
          }
        }
      }
    });
  }
};

// dw = sum over tiles of (transformed big)^T (gradient of the products), in blocks of rows that
// are transformed together and then multiplied for each square of channels. In words of bfloat16
// pairs two neighbouring tiles share a word.
template <class T, int M>
struct Gradient {
  static constexpr int points = Winograd<M>::points;
  static constexpr int squares = points * points;

  const StridedConvShape& shape;
  Map small, big;
  Tiles tiles;
  int64_t small_stride, big_stride, all_words, block_words, row_parts, columns;
  int teams;         // of threads, which share the words and have scratch of their own
  int team_threads;  // at most

  explicit Gradient(const StridedConvShape& s)
      : shape(s), small(small_map(s)), big(big_map(s)), tiles(s.batch, s.height, s.width, M) {
    small_stride = row_stride(round_up(small.channels, Vec::width));
    big_stride = row_stride(round_up(big.channels, kBlockColumns));
    const int64_t word_bytes = squares * (small_stride + 4 * big_stride) * 4;
    all_words = ceil_div(tiles.count, kPerWord<T>);
    // Small sums are those of each thread's own words, which then have nothing else in common.
    const int64_t most = std::max<int64_t>(kGradientBytes / (s.threads * word_bytes), 1);
    const bool apart = dweight_floats() * 4 <= kOwnBytes && most >= kOwnWords;
    teams = static_cast<int>(apart ? std::min<int64_t>(s.threads, all_words) : 1);
    team_threads = s.threads / teams;
    const int64_t words = ceil_div(all_words, teams);
    block_words = ceil_div(words, ceil_div(words * teams * word_bytes, kGradientBytes));
    columns = ceil_div(big.channels, kBlockColumns);
    row_parts = ceil_div(small.channels, kGradientRows);
  }

  int64_t dweight_floats() const { return 16 * small.channels * big.channels; }
  int64_t small_plane() const { return block_words * small_stride + kLine; }
  int64_t big_plane() const { return block_words * big_stride + kLine; }

  struct Buffers {
    float* small;     // [square][word][small channels]
    float* big;       // [subgrid][square][word][big channels]
    float* zeros;     // a pixel
    float* products;  // of each thread: [square][kGradientRows][kBlockColumns]
    float* sums;      // [a][4][4][b]
  };
  static constexpr int64_t kThreadProducts = squares * (kGradientRows * kBlockColumns + kLine);

  Buffers carve(Scratch& scratch) const {
    Buffers b;
    b.small = scratch.floats(squares * small_plane());
    b.big = scratch.floats(4 * squares * big_plane());
    b.zeros = scratch.floats(std::max(small.channels, big.channels));
    b.products = scratch.floats(team_threads * kThreadProducts);
    b.sums = scratch.floats(in_place() ? 0 : dweight_floats());
    return b;
  }
  // Whether the sums need not be added up or turned over.
  bool in_place() const { return teams == 1 && shape.weight_layout == Layout::channels_last; }

  // Rows of kPerWord tiles, from `tile` on, into one word of every plane.
  template <class Line, class WindowAt>
  static void transform_word(const WindowAt& window_at, int64_t channels, float* row,
                             int64_t plane) {
    if constexpr (kPerWord<T> == 2) {
      const auto first = window_at(0), second = window_at(1);
      for_each_vector(channels, [&](int64_t c, const auto& read) {
        Vec even[Line::out * Line::out];
        transform_window<Line>(first, c, read,
                               [&](int i, int j, Vec value) { even[i * Line::out + j] = value; });
        transform_window<Line>(second, c, read, [&](int i, int j, Vec value) {
          const int square = i * Line::out + j;
          store(row + square * plane + c, pair_up(even[square], value));
        });
      });
    } else {
      transform_input<Line>(window_at(0), channels, row, plane);
    }
  }

  // A window of M x M places of the small map or of a subgrid of the big one; past the last tile
  // all zeros.
  template <int Size>
  Window<T, Size> window(const Operand<T>& from, int64_t tile, int64_t origin_y, int64_t origin_x,
                         int step) const {
    const bool inside = tile < tiles.count;
    const Tiles::Place at = tiles.place(inside ? tile : 0);
    const int64_t y = inside ? step * M * at.y + origin_y : from.map.height + Size * step;
    return {from, at.image, y, step * M * at.x + origin_x, step};
  }

  void transform_small(const Operand<T>& from, int64_t first, int64_t word,
                       const Buffers& buffers) const {
    using Line = typename Winograd<M>::OutputGrad;
    const int64_t tile = (first + word) * kPerWord<T>;
    for (int i = 0; i < kPerWord<T>; ++i) {
      prefetch_tile(from, tiles, tile + i + kPerWord<T> - 1, {M, 0, 0, 1});
    }
    transform_word<Line>([&](int i) { return window<Line::in>(from, tile + i, 0, 0, 1); },
                         small.channels, buffers.small + word * small_stride, small_plane());
  }

  void transform_big(const Operand<T>& from, int set, int64_t first, int64_t word,
                     const Buffers& buffers) const {
    using Line = typename Winograd<M>::Input;
    const int64_t tile = (first + word) * kPerWord<T>;
    const int y = set / 2 - 1, x = set % 2 - 1;
    for (int i = 0; i < kPerWord<T>; ++i) {
      prefetch_tile(from, tiles, tile + i + kPerWord<T> - 1, {2 * M, y & 1, x & 1, 2});
    }
    transform_word<Line>(
        [&](int i) { return window<Line::in>(from, tile + i, y, x, 2); }, big.channels,
        buffers.big + set * squares * big_plane() + word * big_stride, big_plane());
  }

  template <int Rows, int Vectors>
  static void multiply_rows(const float* left, int64_t left_stride, const float* right,
                            int64_t right_stride, int64_t depth, float* made) {
    Vec acc[Rows][Vectors];
    clear(acc);
    accumulate_columns<kPairs<T>, Rows, Vectors>(acc, left, left_stride, right, right_stride,
                                                 depth);
    store_block(made, kBlockColumns, acc);
  }

  template <int Vectors>
  void multiply(const Buffers& buffers, int set, int64_t a, int64_t rows, int64_t column,
                int64_t depth, float* made) const {
    for (int square = 0; square < squares; ++square) {
      const float* left = buffers.small + square * small_plane() + a;
      const float* right =
          buffers.big + (set * squares + square) * big_plane() + column * kBlockColumns;
      float* out = made + square * (kGradientRows * kBlockColumns + kLine);
      for_row_blocks(rows, [&](auto count, int64_t r) {
        multiply_rows<decltype(count)::value, Vectors>(left + r, small_stride, right, big_stride,
                                                       depth, out + r * kBlockColumns);
      });
    }
  }

  // Adds the products of one square of channels to the taps of subgrid `set`.
  void finish(const float* made, int set, int64_t a, int64_t rows, int64_t column, bool add,
              float* dweight) const {
    const int64_t B = big.channels;
    for (int v = 0; v < kBlockVectors; ++v) {
      const int64_t b = column * kBlockColumns + v * Vec::width;
      if (b >= B) return;
      const int lanes = static_cast<int>(std::min<int64_t>(Vec::width, B - b));
      for (int64_t r = 0; r < rows; ++r) {
        const float* m = made + r * kBlockColumns + v * Vec::width;
        along_both<typename Winograd<M>::WeightGrad>(
            [&](int i, int j) {
              return load(m + (i * points + j) * (kGradientRows * kBlockColumns + kLine));
            },
            [&](int i, int j, Vec value) {
              const int tap = 4 * (set / 2 + 2 * i) + set % 2 + 2 * j;
              float* to = dweight + ((a + r) * 16 + tap) * B + b;
              if (lanes == Vec::width) {
                store(to, add ? load(to) + value : value);
              } else {
                store(to, add ? load(to, lanes) + value : value, lanes);
              }
            });
      }
    }
  }

  void run(const T* small_values, const T* big_values, const MapNorm& norm, float* dweight,
           void* scratch) const {
    const bool norm_of_small = shape.normalized == ConvMap::small;
    const bool turned = shape.weight_layout != Layout::channels_last;
    const int64_t bytes = team_bytes(*this);
    const auto buffers_of = [&](int64_t team) {
      Scratch pieces(static_cast<char*>(scratch) + team * bytes);
      Buffers buffers = carve(pieces);
      if (team == 0 && !turned) buffers.sums = dweight;
      return buffers;
    };
    parallel_for(teams, teams, [&](int64_t team) {
      const Buffers buffers = buffers_of(team);
      const int64_t channels = std::max(small.channels, big.channels);
      std::memset(buffers.zeros, 0, static_cast<size_t>(channels) * sizeof(float));
      const T* zeros = reinterpret_cast<const T*>(buffers.zeros);
      add_words({small_values, small, norm_of_small ? norm : MapNorm(), zeros},
                {big_values, big, norm_of_small ? MapNorm() : norm, zeros},
                all_words * team / teams, all_words * (team + 1) / teams, buffers);
    });
    if (in_place()) return;
    const int64_t B = big.channels;
    float* sums = buffers_of(0).sums;
    parallel_for(shape.threads, small.channels, [&](int64_t a) {
      float* row = sums + a * 16 * B;
      for (int64_t team = 1; team < teams; ++team) {
        const float* other = buffers_of(team).sums + a * 16 * B;
        for (int64_t i = 0; i < 16 * B; ++i) row[i] += other[i];
      }
      if (!turned) return;
      for (int64_t b = 0; b < B; ++b) {
        for (int t = 0; t < 16; ++t) dweight[(a * B + b) * 16 + t] = row[t * B + b];
      }
    });
  }

  // The sums of the words from `from` to `to`, by a team.
  void add_words(const Operand<T>& small_in, const Operand<T>& big_in, int64_t from, int64_t to,
                 const Buffers& buffers) const {
    const int64_t A = small.channels, B = big.channels;
    for (int64_t first = from; first < to; first += block_words) {
      const int64_t depth = std::min(block_words, to - first);
      // Subgrids come in the order of their products: what a thread transforms it multiplies.
      parallel_for(team_threads, 4 * depth, [&](int64_t i) {
        transform_big(big_in, static_cast<int>(i / depth), first, i % depth, buffers);
      });
      parallel_for(team_threads, depth,
                   [&](int64_t word) { transform_small(small_in, first, word, buffers); });
      const int64_t items = 4 * row_parts * columns;
      const int64_t threads = std::min<int64_t>(team_threads, items);
      parallel_for(static_cast<int>(threads), threads, [&](int64_t thread) {
        float* made = buffers.products + thread * kThreadProducts;
        for (int64_t item = items * thread / threads; item < items * (thread + 1) / threads;
             ++item) {
          const int64_t column = item % columns, part = item / columns % row_parts;
          const int set = static_cast<int>(item / (columns * row_parts));
          const int64_t a = part * kGradientRows, rows = std::min(kGradientRows, A - a);
          if (B - column * kBlockColumns > Vec::width) {
            multiply<2>(buffers, set, a, rows, column, depth, made);
          } else {
            multiply<1>(buffers, set, a, rows, column, depth, made);
          }
          finish(made, set, a, rows, column, first > from, buffers.sums);
        }
      });
    }
  }
};

// Calls body with a value of the element type and with the tile size of the method.
template <class Body>
auto with_type_and_tile(const StridedConvShape& s, const Body& body) {
  const bool wide = s.method == ConvMethod::f42;
  if (s.dtype == DType::f32) {
    return wide ? body(float{}, std::integral_constant<int, 4>{})
                : body(float{}, std::integral_constant<int, 2>{});
  }
  return wide ? body(bfloat16{}, std::integral_constant<int, 4>{})
              : body(bfloat16{}, std::integral_constant<int, 2>{});
}

}  // namespace

ConvMethod strided_conv_method(const StridedConvShape& s, ConvPass pass) {
  // F(4, 2) in bfloat16 words is three to four times coarser than a plain convolution; F(2, 2)
  // stays within twice where sums are long.
  const bool coarse = kHasPairs && s.dtype == DType::bf16;
  if (s.method == ConvMethod::none) return ConvMethod::none;
  if (s.method == ConvMethod::f22) return s.method;
  if (s.method == ConvMethod::f42) return coarse ? ConvMethod::none : s.method;
  if (direct_takes(s, pass)) return ConvMethod::direct;
  if (s.method == ConvMethod::direct) return ConvMethod::none;
  if (std::min(s.small_channels, s.big_channels) < (coarse ? 48 : 16)) return ConvMethod::none;
  if (coarse && std::min(s.height, s.width) < 4) return ConvMethod::none;
  // Products of each method a place, in the rounded-up tiles, with what the transforms of the
  // weight cost in products: measured, about 32 for each of its floats.
  const auto cost = [&](int m) {
    const int points = m + 1;
    const int64_t tiles = s.batch * ceil_div(s.height, m) * ceil_div(s.width, m);
    return (tiles + (pass == ConvPass::weight_grad ? 0 : 32)) * 4 * points * points;
  };
  const ConvMethod best = !coarse && cost(4) < cost(2) ? ConvMethod::f42 : ConvMethod::f22;
  // Below nine tenths of the plain products the transforms of the maps are paid for.
  const int64_t plain = s.batch * s.height * s.width * 16;
  return 10 * cost(best == ConvMethod::f42 ? 4 : 2) < 9 * plain ? best : ConvMethod::none;
}

int64_t strided_conv_scratch(const StridedConvShape& s, ConvPass pass) {
  if (s.method == ConvMethod::direct) return direct_scratch(s, pass);
  return with_type_and_tile(s, [&](auto type, auto tile) {
    using T = decltype(type);
    constexpr int M = decltype(tile)::value;
    if (pass == ConvPass::up) return scratch_bytes(Product<T, M, true>(s));
    if (pass == ConvPass::down) return scratch_bytes(Product<T, M, false>(s));
    return scratch_bytes(Gradient<T, M>(s));
  });
}

void strided_conv_up(const StridedConvUp& args) {
  if (args.shape.method == ConvMethod::direct) return direct_up(args);
  const MapNorm norm = norm_of(args);
  with_type_and_tile(args.shape, [&](auto type, auto tile) {
    using T = decltype(type);
    Product<T, decltype(tile)::value, true>(args.shape)
        .run(static_cast<const T*>(args.small), norm, args.weight, args.bias,
             static_cast<T*>(args.big), args.scratch);
  });
}

void strided_conv_down(const StridedConvDown& args) {
  if (args.shape.method == ConvMethod::direct) return direct_down(args);
  const MapNorm norm = norm_of(args);
  with_type_and_tile(args.shape, [&](auto type, auto tile) {
    using T = decltype(type);
    Product<T, decltype(tile)::value, false>(args.shape)
        .run(static_cast<const T*>(args.big), norm, args.weight, args.bias,
             static_cast<T*>(args.small), args.scratch);
  });
}

void strided_conv_weight_grad(const StridedConvWeightGrad& args) {
  if (args.shape.method == ConvMethod::direct) return direct_weight_grad(args);
  const MapNorm norm = norm_of(args);
  with_type_and_tile(args.shape, [&](auto type, auto tile) {
    using T = decltype(type);
    Gradient<T, decltype(tile)::value>(args.shape)
        .run(static_cast<const T*>(args.small), static_cast<const T*>(args.big), norm, args.dweight,
             args.scratch);
  });
}

}  // namespace pygan::PYGAN_ISA_NS
