// Which CTA computes what. A tile is (expert, NWG units of weight rows, up to NMAX slots). Tiles are numbered expert by expert, row
// tiles outside slot tiles. Whole waves of tiles go one to a CTA; the last one to two waves are cut into equal ranges of k blocks
// (stream-K), so every CTA does the same amount of work whatever the number of tiles. A tile cut between CTAs is finished by the CTA
// that has its first k block, which comes last in that CTA's range, so it never waits for long: the others did theirs first.
#pragma once
#include <cstdint>

namespace sm90 {

constexpr int kMaxExperts = 512;

struct Tile {
    int expert, row_tile, slot0, rows, kb0, kb1, sk_end;   // slot0: first slot, absolute; sk_end: item number after the tile's last
};

// What every warp needs to find its tiles, in shared memory; a warp keeps only a Cursor in registers.
struct ScheduleTables {
    int tiles_before[kMaxExperts + 1];   // slot tiles of the experts before
    int offsets[kMaxExperts], counts[kMaxExperts];
    int row_tiles, kblocks, waves, base, items, nmax;

    __device__ __forceinline__ void init(int num_experts, int row_tiles_, int kblocks_, int nmax_) {
        const int grid = gridDim.x;
        const int total = tiles_before[num_experts] * row_tiles_;
        const int full = total / grid;
        row_tiles = row_tiles_;
        kblocks = kblocks_;
        nmax = nmax_;
        waves = (total % grid == 0) ? full : max(full - 1, 0);
        base = waves * grid;
        items = (total - base) * kblocks_;
    }
    // items < 2 * grid * kblocks, so the product stays within 32 bits
    __device__ __forceinline__ int range_begin(int cta) const {
        return static_cast<int>(static_cast<uint32_t>(cta) * static_cast<uint32_t>(items) / gridDim.x);
    }
};

struct Cursor {
    int position = 0;   // waves done, then -1 - first item not yet done
    int expert = 0;

    __device__ __forceinline__ bool next(const ScheduleTables& s, Tile& t) {
        while (true) {
            int tile;
            const int kblocks = s.kblocks;
            if (position >= 0 && position < s.waves) {
                tile = position * gridDim.x + blockIdx.x;
                ++position;
                t.kb0 = 0;
                t.kb1 = kblocks;
                t.sk_end = 0;
            } else {
                const int cur = position >= 0 ? s.range_begin(blockIdx.x) : -1 - position;
                const int left = s.range_begin(blockIdx.x + 1) - cur;
                if (left <= 0) return false;
                const int st = cur / kblocks;
                tile = s.base + st;
                t.kb0 = cur - st * kblocks;
                t.sk_end = (st + 1) * kblocks;
                t.kb1 = min(kblocks, t.kb0 + left);
                position = -1 - (cur + t.kb1 - t.kb0);
            }
            while (s.tiles_before[expert + 1] * s.row_tiles <= tile) ++expert;
            const int first = s.tiles_before[expert];
            const int slot_tiles = s.tiles_before[expert + 1] - first;
            const int in_expert = tile - first * s.row_tiles;
            const int begin = s.offsets[expert], count = s.counts[expert];
            t.expert = expert;
            t.row_tile = in_expert / slot_tiles;
            const int n = in_expert - t.row_tile * slot_tiles;
            // few slot tiles are made equally long; with many the last one would come out empty
            const int rows = slot_tiles > 8 ? s.nmax : min(s.nmax, ((count + slot_tiles - 1) / slot_tiles + 7) / 8 * 8);
            t.slot0 = begin + n * rows;
            t.rows = min(rows, count - n * rows);
            if (t.rows > 0) return true;
        }
    }
};

}  // namespace sm90
