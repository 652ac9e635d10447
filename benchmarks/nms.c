/* Greedy NMS over boxes x_min, y_min, x_max, y_max; `order` lists them by falling score. Returns how many are kept. */
#include <stdlib.h>

long nms(const float *boxes, const long *order, long count, float threshold, long *kept)
{
    char *suppressed = calloc(count ? count : 1, 1);
    float *areas = malloc((count ? count : 1) * sizeof(float));
    long number = 0;
    for (long i = 0; i < count; i++)
        areas[i] = (boxes[4 * i + 2] - boxes[4 * i]) * (boxes[4 * i + 3] - boxes[4 * i + 1]);
    for (long i = 0; i < count; i++) {
        const long best = order[i];
        const float *a = boxes + 4 * best;
        if (suppressed[best])
            continue;
        kept[number++] = best;
        for (long j = i + 1; j < count; j++) {
            const long other = order[j];
            const float *b = boxes + 4 * other;
            if (suppressed[other])
                continue;
            const float left = a[0] > b[0] ? a[0] : b[0], top = a[1] > b[1] ? a[1] : b[1];
            const float right = a[2] < b[2] ? a[2] : b[2], bottom = a[3] < b[3] ? a[3] : b[3];
            const float width = right > left ? right - left : 0, height = bottom > top ? bottom - top : 0;
            const float overlap = width * height;
            if (overlap / (areas[best] + areas[other] - overlap) > threshold)
                suppressed[other] = 1;
        }
    }
    free(areas);
    free(suppressed);
    return number;
}
