#include "kernels.h"

namespace lsk {

LSK_INSTANTIATE(float)

int compiled_capability() { return compiled_for(scale_kernel<float>); }

void count_clusters(Device& device) {
  for (int i = 0; i < 4 && device.capability >= 90; ++i)
    device.clusters[i] = clusters_at_a_time(cluster_kernel<float, false>, largest_cluster(1 << i, device));
}

}  // namespace lsk
